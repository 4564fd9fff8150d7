"""A run's folder: one run at a time, never over what is there, never half a pipeline; a dead run holds up nobody."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from sudden_death import die_before_every_change

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel
from diffusers_dtr.training.run import folder as run_folder
from diffusers_dtr.training.run.folder import (
    check_output_dir,
    lock_run_folder,
    save_pipeline,
    save_record,
    unlock_run_folder,
)


def make_pipeline(seed: int = 0, vae: bool = False) -> DTRPipeline:
    torch.manual_seed(seed)
    size = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "sample_size": 4}
    transformer = DTRTransformer2DModel(**size, num_embeds_ada_norm=2)
    autoencoder = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2) if vae else None
    return DTRPipeline(transformer=transformer, scheduler=DDPMScheduler(), vae=autoencoder)


def weight(pipeline: DTRPipeline) -> torch.Tensor:
    return pipeline.transformer.pos_embed.proj.weight


@pytest.mark.parametrize("present", ["model_index.json", "checkpoint-10"])
def test_only_a_resumed_run_goes_on_in_a_folder_with_results(present, tmp_path):
    for other in ("notes.txt", "logs", "checkpoint-10.partial"):
        (tmp_path / other).mkdir()
    check_output_dir(tmp_path)
    (tmp_path / present).mkdir()
    for resumed in (None, "latest"):
        with pytest.raises(ValueError, match=f"already holds {present}.* as no checkpoint in it is complete"):
            check_output_dir(tmp_path, resumed)


def test_pipeline_replaces_an_older_one_and_leaves_nothing_else_behind(tmp_path):
    (tmp_path / "logs").mkdir()
    save_pipeline(make_pipeline(0, vae=True), tmp_path)
    newer = make_pipeline(1)
    save_pipeline(newer, tmp_path)
    loaded = DTRPipeline.from_pretrained(tmp_path)
    assert torch.equal(weight(loaded), weight(newer))
    assert loaded.vae is None
    assert {path.name for path in tmp_path.iterdir()} >= {"logs", "model_index.json", "scheduler", "transformer"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("has_older", [False, True])
def test_whenever_saving_is_cut_off_the_folder_loads_as_one_pipeline_or_not_at_all(has_older, tmp_path):
    older, newer = make_pipeline(0), make_pipeline(1)
    folder, untouched = tmp_path / "run", tmp_path / "untouched"
    untouched.mkdir()
    if has_older:
        save_pipeline(older, untouched)
    shutil.copytree(untouched, folder)
    found = []

    def check():
        if (folder / "model_index.json").exists():
            found.append(weight(DTRPipeline.from_pretrained(folder)))
        shutil.rmtree(folder)
        shutil.copytree(untouched, folder)

    assert die_before_every_change(lambda: save_pipeline(newer, folder), check) > 10
    assert all(torch.equal(one, weight(older)) or torch.equal(one, weight(newer)) for one in found)
    assert any(torch.equal(one, weight(older)) for one in found) is has_older
    assert torch.equal(weight(DTRPipeline.from_pretrained(folder)), weight(newer))


def test_record_is_json_and_replaced_as_a_whole(tmp_path):
    file, old = tmp_path / "training_config.json", {"results": {"loss": 1.5}}
    save_record(old, tmp_path)
    contents = []
    die_before_every_change(
        lambda: save_record({"name": "β"}, tmp_path), lambda: contents.append(json.loads(file.read_text()))
    )
    assert contents == [old] * len(contents)
    assert json.loads(file.read_text(encoding="utf-8")) == {"name": "β"}


def test_a_pipeline_without_checkpoints_is_nobodys_to_go_on_with(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    other = tmp_path.parent / f"{tmp_path.name}-other" / "checkpoint-3"
    for checkpoint in (tmp_path / "checkpoint-1", other):
        with pytest.raises(ValueError, match=r"already holds model_index\.json"):
            check_output_dir(tmp_path, "latest" if checkpoint != other else str(other))
        checkpoint.mkdir(parents=True)
        (checkpoint / "training_state.json").write_text("{}")
    check_output_dir(tmp_path, "latest")
    check_output_dir(tmp_path, str(tmp_path / "checkpoint-1"))
    check_output_dir(tmp_path, "checkpoint-1")
    (tmp_path / "checkpoint-1").rename(tmp_path / "checkpoint-best")
    check_output_dir(tmp_path, "checkpoint-best")
    with pytest.raises(ValueError, match=r"already holds model_index\.json"):
        check_output_dir(tmp_path, str(other))


# ---- the lock


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    monkeypatch.setattr(run_folder, "_held", {})
    yield
    run_folder._unlock_all()


def run_with_a_worker(folder, locked):
    """As a run has them while its images are loaded, so that it leaves them behind when it is killed."""
    os.setsid()
    lock_run_folder(folder)
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(3,)).start()
    locked.set()
    time.sleep(60)


@pytest.fixture
def other(tmp_path):
    """Another process that runs in the folder."""
    fork = multiprocessing.get_context("fork")
    locked = fork.Event()
    process = fork.Process(target=run_with_a_worker, args=(tmp_path, locked))
    process.start()
    assert locked.wait(60)
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def test_second_run_is_told_of_the_first_until_that_is_killed(other, tmp_path):
    with pytest.raises(ValueError, match=rf"is in use by a run of process {other.pid} on ") as error:
        lock_run_folder(tmp_path)
    assert error.value.__cause__ is None  # nothing of the lock's own error in a traceback
    other.kill()
    other.join()
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


def test_nothing_is_left_of_a_lock_and_of_a_folder_that_was_made_for_it(tmp_path):
    folders = [tmp_path / "there", tmp_path / "made" / "for" / "it", tmp_path / "kept" / "run"]
    folders[0].mkdir()
    for folder in folders:
        lock_run_folder(folder)
    (folders[2] / "latents").mkdir()
    for folder in folders:
        unlock_run_folder(folder)
    assert {path.name for path in tmp_path.rglob("*")} == {"there", "kept", "run", "latents"}


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


def test_the_end_of_a_process_leaves_no_lock(tmp_path):
    code = "import sys; from diffusers_dtr.training.run.folder import *; lock_run_folder(sys.argv[1]); 1 / 0"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("folder", ["/proc/self/task", "/proc/self/task/run", "file"])
def test_folder_that_cannot_be_written_to_is_refused(folder, tmp_path):
    if folder.startswith("/proc") and not Path("/proc/self/task").exists():
        pytest.skip("needs /proc, where nobody can write, not even root")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="`output_dir` must be a folder that can be written to, got '/"):
        lock_run_folder(tmp_path / folder)
    assert (tmp_path / "file").read_text() == "mine"
