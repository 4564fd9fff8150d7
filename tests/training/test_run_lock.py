"""Two processes never run in one folder, and a dead one holds up nobody."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusers_dtr.training.run import folder as run_folder
from diffusers_dtr.training.run.folder import lock_run_folder, unlock_run_folder


# As a run has them while its images are loaded, so that it leaves them behind when it is killed
WITH_A_WORKER = """
import multiprocessing, sys, time
from diffusers_dtr.training.run.folder import lock_run_folder
lock_run_folder(sys.argv[1])
multiprocessing.get_context("fork").Process(target=time.sleep, args=(3,)).start()
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    monkeypatch.setattr(run_folder, "_held", {})
    yield
    run_folder._unlock_all()


@pytest.fixture
def other(tmp_path):
    """Another process that runs in the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_A_WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_second_run_is_told_of_the_first_until_that_is_killed(other, tmp_path):
    with pytest.raises(ValueError, match=rf"is in use by a run of process {other.pid} on ") as error:
        lock_run_folder(tmp_path)
    assert error.value.__cause__ is None  # nothing of the lock's own error in a traceback
    other.kill()
    other.wait()
    # Its worker ends a little later. Not every version of filelock lets go of the lock in a child.
    deadline = time.monotonic() + 6
    while True:
        try:
            lock_run_folder(tmp_path)
            break
        except ValueError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert f"process {os.getpid()} on" in (tmp_path / ".run.lock.holder").read_text()


def test_a_process_may_take_its_folder_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lock_run_folder(tmp_path)
    lock_run_folder(Path("."))
    unlock_run_folder(tmp_path)
    monkeypatch.setattr(run_folder, "_held", {})  # as another process would find it
    lock_run_folder(tmp_path)


def test_folders_do_not_concern_each_other(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        lock_run_folder(tmp_path / name)
    unlock_run_folder(tmp_path)


def test_nothing_is_left_of_a_lock_and_of_a_folder_that_was_made_for_it(tmp_path):
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "there", tmp_path / "made" / "for" / "it"):
        lock_run_folder(folder)
        unlock_run_folder(folder)
    assert [*tmp_path.rglob("*")] == [tmp_path / "there"]


def test_a_folder_with_something_in_it_stays(tmp_path):
    lock_run_folder(tmp_path / "made" / "run")
    (tmp_path / "made" / "run" / "latents").mkdir()
    unlock_run_folder(tmp_path / "made" / "run")
    assert {path.name for path in tmp_path.rglob("*")} == {"made", "run", "latents"}


def take_turns(folder):
    """Ends with an error if two processes hold the folder at once."""
    for _ in range(200):
        try:
            lock_run_folder(folder)
        except ValueError:
            continue
        os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
        (folder / "inside").unlink()
        unlock_run_folder(folder)


def test_a_lock_that_is_deleted_at_the_end_is_never_held_by_two(tmp_path):
    workers = [multiprocessing.get_context("fork").Process(target=take_turns, args=(tmp_path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("end", ["sys.exit(2)", "raise KeyError('a bug')", "pass"])
def test_the_end_of_a_process_leaves_no_lock(end, tmp_path):
    code = f"import sys; from diffusers_dtr.training.run.folder import *; lock_run_folder(sys.argv[1]); {end}"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc, where nobody can write, not even root")
@pytest.mark.parametrize("folder", ["/proc/self/task", "/proc/self/task/run"])
def test_folder_that_cannot_be_written_to_is_refused(folder):
    with pytest.raises(ValueError, match="`output_dir` must be a folder that can be written to, got '/proc/"):
        lock_run_folder(folder)


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="`output_dir` must be a folder that can be written to"):
        lock_run_folder(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"
