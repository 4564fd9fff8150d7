"""Two processes never run in one folder, and a dead one holds up nobody."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusers_dtr.training import run_lock
from diffusers_dtr.training.run_lock import lock_run_folder, unlock_run_folder


# As a run has them while its images are loaded, so that it leaves them behind when it is killed
WITH_A_WORKER = """
import multiprocessing, sys, time
from diffusers_dtr.training.run_lock import lock_run_folder
lock_run_folder(sys.argv[1])
multiprocessing.get_context("fork").Process(target=time.sleep, args=(3,)).start()
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    monkeypatch.setattr(run_lock, "_held", {})


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
    monkeypatch.setattr(run_lock, "_held", {})  # as another process would find it
    lock_run_folder(tmp_path)


def test_folders_do_not_concern_each_other(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        lock_run_folder(tmp_path / name)
    unlock_run_folder(tmp_path)
