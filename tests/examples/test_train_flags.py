"""What the flags of the optimizer, the noise, the average and the tracker do to a run."""

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from training_runs import assert_equal_weights, make_images, same_weights, train, weights


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def plain_run(images, tmp_path_factory):
    return train(images, tmp_path_factory.mktemp("plain") / "run")


def test_no_largest_norm_leaves_gradients_as_they_are(images, plain_run, tmp_path):
    unclipped = train(images, tmp_path / "none", "--max_grad_norm", 0)
    assert_equal_weights(unclipped, train(images, tmp_path / "huge", "--max_grad_norm", 1e30))
    assert all(torch.isfinite(tensor).all() for tensor in weights(unclipped).values())
    assert not same_weights(unclipped, train(images, tmp_path / "tiny", "--max_grad_norm", 1e-6))


def test_learning_rate_of_a_run_that_accumulates_is_diffusers_schedule(images, tmp_path, monkeypatch):
    logged = {}
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.setdefault(step, values.get("lr")))
    flags = ["--lr_scheduler", "polynomial", "--lr_power", 2, "--lr_warmup_steps", 1, "--max_train_steps", 6]
    train(images, tmp_path / "run", *flags, "--logging_steps", 1, "--gradient_accumulation_steps", 2)
    optimizer = torch.optim.AdamW(torch.nn.Linear(1, 1).parameters(), lr=1e-2)
    scheduler = get_scheduler("polynomial", optimizer, num_warmup_steps=1, num_training_steps=6, power=2.0)
    expected = {}
    for step in range(1, 7):
        optimizer.step()
        scheduler.step()
        expected[step] = optimizer.param_groups[0]["lr"]
    assert logged == expected


def test_scaled_learning_rate_is_that_per_image_of_a_step(images, tmp_path):
    flags = ["--gradient_accumulation_steps", 2, "--train_batch_size", 4]
    scaled = train(images, tmp_path / "scaled", *flags, "--learning_rate", 2**-10, "--scale_lr")
    assert_equal_weights(scaled, train(images, tmp_path / "given", *flags, "--learning_rate", 2**-7))


@pytest.mark.parametrize("flags", [("--noise_offset", 0.5), ("--input_perturbation", 0.5)], ids=lambda flags: flags[0])
def test_changed_noise_is_learned_and_is_the_same_after_resuming(flags, images, plain_run, tmp_path):
    whole = train(images, tmp_path / "whole", *flags, "--checkpointing_steps", 1)
    assert not same_weights(whole, plain_run)
    resumed = ["--resume_from_checkpoint", whole / "checkpoint-1"]
    assert_equal_weights(whole, train(images, tmp_path / "resumed", *flags, *resumed))


def test_average_is_the_same_wherever_it_lies(images, tmp_path):
    flags = ["--use_ema", "--ema_max_decay", 0.5, "--checkpointing_steps", 2]
    resident = train(images, tmp_path / "resident", *flags)
    assert_equal_weights(resident, train(images, tmp_path / "offloaded", *flags, "--offload_ema"))
    resumed = ["--offload_ema", "--resume_from_checkpoint", resident / "checkpoint-2"]
    assert_equal_weights(resident, train(images, tmp_path / "resumed", *flags, *resumed))


def test_grids_are_drawn_when_epochs_end(images, tmp_path):
    flags = ["--validation_epochs", 2, "--train_batch_size", 16, "--max_train_steps", 7]  # 24 images: 2 are 3 steps
    run = train(images, tmp_path / "run", *flags)
    assert [path.stem for path in sorted((run / "samples").iterdir())] == [f"step-{step:08d}" for step in (3, 6, 7)]


def test_tracker_has_the_project_that_was_named(images, tmp_path):
    run = train(images, tmp_path / "run", "--report_to", "tensorboard", "--tracker_project_name", "mine")
    assert [path.name for path in (run / "logs").iterdir()] == ["mine"]
