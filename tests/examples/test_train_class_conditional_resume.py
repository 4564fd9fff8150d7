"""A run that is interrupted at any moment and resumed ends with the weights of the uninterrupted one, to the bit."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from training_runs import (
    arguments,
    assert_close_weights,
    assert_equal_weights,
    finish,
    kill,
    launch,
    make_images,
    record,
    same_weights,
    train,
    wait_for,
    weights,
)

from diffusers_dtr.training import trainer


pytestmark = pytest.mark.usefixtures("one_thread")

# Everything that has a state, or draws at random.
EVERYTHING = [
    *("--max_train_steps", 6, "--checkpointing_steps", 2, "--gradient_accumulation_steps", 2, "--learn_sigma"),
    *("--use_ema", "--random_flip", "--class_dropout_prob", 0.5, "--routing_warmup_steps", 5),
    *("--lr_scheduler", "cosine", "--lr_warmup_steps", 2, "--adam_weight_decay", 0.1, "--loss_weighting", "min_snr"),
]

# Nobody waits for its end.
LONG = ["--max_train_steps", 100_000, "--checkpointing_steps", 5]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory) -> Path:
    return train(images, tmp_path_factory.mktemp("runs") / "uninterrupted", *EVERYTHING)


def interrupted(run: Path, folder: Path, step: int) -> Path:
    """What is left of a run that was killed after a checkpoint."""
    folder.mkdir()
    shutil.copytree(run / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


@pytest.mark.parametrize(
    ("step", "checkpoint", "watching"),
    [
        (2, "latest", ("--validation_steps", 1, "--logging_steps", 1)),
        (4, "checkpoint-4", ("--dataloader_num_workers", 2)),
    ],
)
def test_resumed_run_ends_with_the_uninterrupted_weights(step, checkpoint, watching, images, uninterrupted, tmp_path):
    run = interrupted(uninterrupted, tmp_path / "run", step)
    train(images, run, *EVERYTHING, *watching, "--resume_from_checkpoint", checkpoint)
    assert_equal_weights(run, uninterrupted)
    assert_equal_weights(run / "checkpoint-6", uninterrupted / "checkpoint-6")
    assert_equal_weights(run / "checkpoint-6", uninterrupted / "checkpoint-6", "transformer_ema")
    assert not same_weights(run / "checkpoint-6", run)  # the average is another model


def test_a_run_goes_on_from_a_checkpoint_of_another_folder(images, uninterrupted, tmp_path):
    train(images, tmp_path / "run", *EVERYTHING, "--resume_from_checkpoint", uninterrupted / "checkpoint-4")
    assert_equal_weights(tmp_path / "run", uninterrupted)


def test_a_folder_of_images_that_was_copied_elsewhere_is_the_same_to_the_bit(images, uninterrupted, tmp_path):
    run, copied = interrupted(uninterrupted, tmp_path / "run", 4), shutil.copytree(images, tmp_path / "copied")
    train(copied, run, *EVERYTHING, "--resume_from_checkpoint", "latest")
    assert_equal_weights(run, uninterrupted)


def test_resuming_a_finished_run_saves_the_same_pipeline_again(images, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "model_index.json").unlink()
    train(images, run, *EVERYTHING, "--resume_from_checkpoint", "latest")
    assert_equal_weights(run, uninterrupted)
    assert (run / "model_index.json").exists()
    flags = [*EVERYTHING, "--max_train_steps", 5, "--lr_warmup_steps", 2]
    with pytest.raises(ValueError, match="`--max_train_steps` must be at least the 6 steps of the checkpoint, got 5"):
        train(images, run, *flags, "--resume_from_checkpoint", "latest")


def test_flags_of_the_resumed_run_count_for_the_learning_rate(images, uninterrupted, tmp_path):
    slow, none = (interrupted(uninterrupted, tmp_path / name, 4) for name in ("slow", "none"))
    for run, rate in ((slow, 1e-4), (none, 0)):
        train(images, run, *EVERYTHING, "--learning_rate", rate, "--resume_from_checkpoint", "latest")
    assert same_weights(none / "checkpoint-6", none / "checkpoint-4")
    assert not same_weights(slow / "checkpoint-6", slow / "checkpoint-4")


def test_other_files_in_the_places_of_images_are_refused(images, uninterrupted, tmp_path):
    run = interrupted(uninterrupted, tmp_path / "run", 4)
    shutil.copytree(images, tmp_path / "images")
    first = min((tmp_path / "images" / "a").iterdir())
    first.rename(first.with_name("last.png"))
    with pytest.raises(ValueError, match="`fingerprint of file names and labels` was"):
        train(tmp_path / "images", run, *EVERYTHING, "--resume_from_checkpoint", "latest")


def test_what_was_changed_in_resuming_is_said_and_recorded(images, uninterrupted, tmp_path, caplog):
    run, other = (interrupted(uninterrupted, tmp_path / name, 4) for name in ("run", "other"))
    flags = ["--prediction_type", "v_prediction", "--resume_from_checkpoint", "latest", "--allow_changed_settings"]
    train(images, run, *EVERYTHING, *flags, "--ema_max_decay", 0.5, "--gradient_accumulation_steps", 1)
    train(images, other, *EVERYTHING, *flags, "--gradient_accumulation_steps", 1)
    changes = {change.pop("setting"): change for change in record(run)["changed_settings"]}
    assert changes["--prediction_type"] == {"step": 4, "before": "epsilon", "after": "v_prediction"}
    assert changes["--ema_max_decay"] == {"step": 4, "before": 0.9999, "after": 0.5}
    assert "`images per step` was 8 and is 4 now. The run had seen 32 images" in caplog.text
    assert not same_weights(run, other)  # they are averages
    assert "epsilon to v_prediction at step 4" in (run / "README.md").read_text()


def test_time_is_that_of_the_whole_run(images, tmp_path):
    flags = ["--checkpointing_steps", 3, "--max_train_steps"]
    run = train(images, tmp_path / "run", *flags, 3)
    first, second = (run / f"checkpoint-{step}" / "training_state.json" for step in (3, 6))
    state = json.loads(first.read_text())
    assert state["seconds"] > 0
    first.write_text(json.dumps({**state, "seconds": 1000.0}))
    resumed = record(train(images, run, *flags, 6, "--resume_from_checkpoint", "latest"))
    assert resumed["seconds"] >= round(json.loads(second.read_text())["seconds"], 1) >= 1000


def test_run_that_is_told_to_stop_saves_its_step_and_says_how_to_go_on(
    images, uninterrupted, tmp_path, monkeypatch, caplog
):
    backward = trainer.Trainer._backward

    def told_to_stop(self, batch, number):
        if number == 5:  # in the middle of step 3, between two checkpoints
            os.kill(os.getpid(), signal.SIGTERM)
        backward(self, batch, number)

    run = tmp_path / "run"
    monkeypatch.setattr(trainer.Trainer, "_backward", told_to_stop)
    with pytest.raises(SystemExit) as stopped:
        train(images, run, *EVERYTHING)
    monkeypatch.setattr(trainer.Trainer, "_backward", backward)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [path.name for path in sorted(run.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-3"]
    assert not (run / "model_index.json").exists()
    assert "Stopped by SIGTERM after step 3. Go on with" in caplog.text
    train(images, run, *EVERYTHING, "--resume_from_checkpoint", "latest")
    assert_equal_weights(run, uninterrupted)


@pytest.mark.slow
def test_interrupt_of_the_whole_process_group_spares_the_workers_until_the_step_is_saved(images, tmp_path):
    run = tmp_path / "run"
    process = launch(arguments(images, run, *LONG, "--dataloader_num_workers", 2))
    wait_for(lambda: any(run.glob("checkpoint-?")), process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "Stopped by SIGINT after step" in output
    assert "DataLoader worker" not in output


@pytest.mark.slow
def test_processes_stop_after_the_same_step_though_one_alone_is_told(images, tmp_path):
    run = tmp_path / "run"
    process = launch(arguments(images, run, *LONG), num_processes=2)
    wait_for(lambda: any(run.glob("checkpoint-?")), process)
    workers = [child for child in psutil.Process(process.pid).children() if "train_class" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[1].terminate()
    output, _ = process.communicate(timeout=60)
    assert "Stopped by SIGTERM after step" in output
    assert process.returncode != 0
    step = max(int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*"))
    finish(launch(arguments(images, run, "--max_train_steps", step, "--resume_from_checkpoint", "latest")))


@pytest.mark.slow
def test_launched_run_is_the_run_in_this_process(images, uninterrupted, tmp_path):
    output = finish(launch(arguments(images, tmp_path / "run", *EVERYTHING)))
    assert_equal_weights(tmp_path / "run", uninterrupted)
    assert "Steps: 100%" in output
    assert "loss=" in output
    assert "lr=" in output
    assert "Saving current state" not in output


@pytest.mark.slow
def test_run_killed_at_random_moments_ends_with_the_uninterrupted_weights(images, uninterrupted, tmp_path):
    """Once while a checkpoint is being written, then at random, then to the end."""
    run = tmp_path / "run"
    argv = arguments(images, run, *EVERYTHING, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest")
    process = launch(argv)
    wait_for(lambda: any(run.glob("checkpoint-*.partial")), process)
    kill(process)
    for _ in range(3):
        done = len(list(run.glob("checkpoint-*")))
        process = launch(argv)
        wait_for(lambda done=done: len(list(run.glob("checkpoint-*"))) > done, process)
        time.sleep(random.uniform(0, 0.1))
        kill(process)
    finish(launch(argv))
    assert_equal_weights(run, uninterrupted)
    assert_equal_weights(run / "checkpoint-6", uninterrupted / "checkpoint-6", "transformer_ema")
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in range(1, 7)]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_two_forward_calls_and_one_goes_on(images, uninterrupted, tmp_path):
    two = tmp_path / "two"
    flags = [*EVERYTHING, "--gradient_accumulation_steps", 1, "--dataloader_num_workers", 1]
    finish(launch(arguments(images, two, *flags), num_processes=2))
    run = train(images, interrupted(two, tmp_path / "run", 2), *EVERYTHING, "--resume_from_checkpoint", "latest")
    for found in (two, run):
        assert_close_weights(weights(found), weights(uninterrupted))
