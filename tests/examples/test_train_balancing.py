"""Clusters and their balancing in the training script: what is learned, resumed, tracked, drawn and recorded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import assert_equal_weights, make_images, record, same_weights, train

from diffusers_dtr import training


pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = ["--max_train_steps", 4, "--checkpointing_steps", 2, "--logging_steps", 1, "--num_clusters", 2, "--use_ema"]
UNCERTAIN = [*FLAGS, "--num_clusters", 4, "--balancing", "uncertainty", "--report_to", "tensorboard"]
METHODS = {
    "uncertainty": ["--balancing", "uncertainty"],
    "PCGrad, accumulated": ["--balancing", "pcgrad", "--gradient_accumulation_steps", 2],
    "NashMTL, weights kept": ["--balancing", "nash_mtl", "--balancing_update_every", 3],
    "fitted to the loss": ["--timestep_sampling", "loss", "--gradient_accumulation_steps", 2],
}


@pytest.fixture(autouse=True)
def quick_fit(monkeypatch):
    """Timesteps follow the losses after each step; they do after fifty."""
    monkeypatch.setitem(training.objective.AdaptiveTimestepSampler.__init__.__kwdefaults__, "interval", 1)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory) -> Path:
    return train(images, tmp_path_factory.mktemp("runs") / "plain", *FLAGS)


@pytest.fixture(scope="module")
def uncertain(images, tmp_path_factory) -> Path:
    return train(images, tmp_path_factory.mktemp("runs") / "uncertain", *UNCERTAIN)


def entries(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "loss_history.jsonl").read_text().splitlines()]


def interrupted(run: Path, folder: Path) -> Path:
    """What is left of a run that was killed in its fourth step: a checkpoint after the second, and its history."""
    shutil.copytree(run / "checkpoint-2", folder / "checkpoint-2")
    history = (run / "loss_history.jsonl").read_text().splitlines()
    (folder / "loss_history.jsonl").write_text("\n".join([*history[:3], history[3][:30]]))
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_run_goes_on_to_the_bit(method, images, plain, tmp_path):
    flags = [*FLAGS, *METHODS[method]]
    whole = train(images, tmp_path / "whole", *flags)
    assert not same_weights(whole, plain)
    run = train(images, interrupted(whole, tmp_path / "run"), *flags, "--resume_from_checkpoint", "latest")
    assert_equal_weights(run, whole)
    assert_equal_weights(run / "checkpoint-4", whole / "checkpoint-4")
    assert_equal_weights(run / "checkpoint-4", whole / "checkpoint-4", "transformer_ema")
    states = [(folder / "checkpoint-4" / "objective.safetensors").read_bytes() for folder in (run, whole)]
    assert states[0] == states[1]
    assert (run / "loss_history.jsonl").read_bytes() == (whole / "loss_history.jsonl").read_bytes()


@pytest.mark.parametrize("balancing", ["uncertainty", "nash_mtl"])
def test_gradient_checkpointing_balances_alike(balancing, images, tmp_path):
    flags = [*FLAGS, "--balancing", balancing, "--max_train_steps", 2]
    one = train(images, tmp_path / "one", *flags)
    assert same_weights(one, train(images, tmp_path / "other", *flags, "--gradient_checkpointing"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler, gcc")
def test_compiled_model_is_balanced_by_gradients(images, tmp_path):
    flags = [*FLAGS, "--balancing", "pcgrad"]
    eager, compiled = train(images, tmp_path / "eager", *flags), train(images, tmp_path / "run", *flags, "--compile")
    losses = [[entry["loss"] for entry in entries(run)] for run in (eager, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_going_on_with_other_clusters_is_refused(images, uncertain, tmp_path):
    run = interrupted(uncertain, tmp_path / "run")
    flags = ["--noise_schedule", "squaredcos_cap_v2", "--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match="`cluster boundaries` was"):
        train(images, run, *UNCERTAIN, *flags)
    assert not (run / "checkpoint-4").exists()


def test_tracker_gets_loss_and_weight_of_every_cluster_at_every_logging_step(uncertain):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(uncertain / "logs" / "class-conditional")).Reload()
    names = [tag for tag in events.Tags()["scalars"] if "/cluster_" in tag]
    assert sorted(names) == [f"{kind}/cluster_{number}" for kind in ("loss", "weight") for number in range(4)]
    for number in range(4):
        for tag, key in (("loss", "clusters"), ("weight", "weights")):
            tracked = events.Scalars(f"{tag}/cluster_{number}")
            assert [event.step for event in tracked] == [1, 2, 3, 4]
            values = [event.value for event in tracked]
            assert values == pytest.approx([entry[key][number] for entry in entries(uncertain)])
        assert values[0] != values[-1]


def test_loss_in_the_tracker_is_that_before_balancing(images, tmp_path):
    flags = ["--max_train_steps", 1, "--timestep_sampling", "clusters", "--num_clusters", 2, "--balancing"]
    uniform, balanced = (
        entries(train(images, tmp_path / name, *flags, name))[0] for name in ("uniform", "uncertainty")
    )
    assert uniform["loss"] == balanced["loss"] == pytest.approx(sum(uniform["clusters"]) / 2)
    assert uniform["clusters"] == balanced["clusters"]
    assert uniform["weights"] == [1, 1] != balanced["weights"]


def test_picture_and_boundaries_are_left_with_the_checkpoints(uncertain):
    assert (uncertain / "loss_per_cluster.png").is_file()
    clusters, arguments = record(uncertain)["clusters"], record(uncertain)["arguments"]
    assert clusters["num_clusters"] == 4 == len(clusters["boundaries"]) - 1
    assert (clusters["boundaries"][0], clusters["boundaries"][-1]) == (0, 1000)
    assert (arguments["balancing"], arguments["cluster_cost"]) == ("uncertainty", "snr")


def test_what_balancing_learns_has_its_own_rate_and_no_decay_also_after_resuming(images, tmp_path, monkeypatch):
    flags = [*FLAGS, "--balancing", "uncertainty", "--learning_rate", 0.01, "--adam_weight_decay", 0.5]
    flags += ["--lr_scheduler", "linear", "--lr_warmup_steps", 1]
    taken = []

    class Spy(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            (group,) = self.param_groups
            if any(parameter.grad.any() for parameter in group["params"]):  # unlike in a step that only makes a state
                taken.append((group["lr"], group["weight_decay"]))
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    whole = train(images, tmp_path / "whole", *flags)
    train(images, interrupted(whole, tmp_path / "run"), *flags, "--resume_from_checkpoint", "latest")
    assert len(taken) == 2 * (4 + 2)
    assert taken[8:] == taken[4:8]
    for (learned, no_decay), (rate, decay) in zip(taken[::2], taken[1::2], strict=True):
        assert (decay, no_decay) == (0.5, 0)
        assert learned == pytest.approx(rate / 0.01 * 0.025)
    assert taken[2][0] == 0.025
