import json
import logging
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from sudden_death import die_before_every_change

from diffusers_dtr import DTRTransformer2DModel
from diffusers_dtr.training import add_lora
from diffusers_dtr.training.checkpoints import Checkpoints


SETTINGS = {"seed": 0}


class Run:
    """A model, optimizer and average of a run, as a script has them."""

    def __init__(self, folder: Path, *, seed: int = 0, use_ema: bool = True, total_limit: int | None = None):
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(seed)
        size = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "sample_size": 4}
        self.model = DTRTransformer2DModel(**size, in_channels=1, num_embeds_ada_norm=2)
        self.ema = None
        if use_ema:
            config = {"model_cls": DTRTransformer2DModel, "model_config": self.model.config}
            self.ema = EMAModel(self.model.parameters(), decay=0.5, **config)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.prepared, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.checkpoints = Checkpoints(self.accelerator, folder, "transformer", self.model, self.ema, total_limit)

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.step(self.model.parameters())

    def state(self) -> list[torch.Tensor]:
        shadow = [] if self.ema is None else self.ema.shadow_params
        moments = [state["exp_avg"] for state in self.optimizer.state.values()]
        return [tensor.detach().clone() for tensor in [*self.model.parameters(), *shadow, *moments]]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert len(left) == len(right)
    assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_resuming_restores_model_average_and_optimizer(tmp_path):
    run = Run(tmp_path)
    run.step()
    run.checkpoints.save(1, SETTINGS)
    expected = run.state()
    other = Run(tmp_path, seed=1)
    assert other.checkpoints.resume("latest", SETTINGS) == 1
    assert_same(other.state(), expected)
    run.step()
    other.step()
    assert_same(other.state(), run.state())
    assert other.ema.optimization_step == 2


def test_weights_are_saved_once_and_as_safetensors_of_the_model(tmp_path):
    run = Run(tmp_path)
    path = run.checkpoints.save(1, SETTINGS)
    assert [file.name for file in path.rglob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"] * 2
    saved = DTRTransformer2DModel.from_pretrained(path / "transformer")
    assert_same(list(saved.parameters()), list(run.model.parameters()))


def test_nothing_is_loaded_unless_asked_or_there(tmp_path):
    run = Run(tmp_path)
    before = run.state()
    assert run.checkpoints.resume("latest", SETTINGS) == 0
    run.checkpoints.save(1, SETTINGS)
    assert run.checkpoints.resume(None, SETTINGS) == 0
    assert_same(run.state(), before)


def test_latest_is_the_highest_step_rather_than_the_last_name(tmp_path):
    run = Run(tmp_path)
    for step in (9, 10):
        run.checkpoints.save(step, SETTINGS)
    assert run.checkpoints.latest() == tmp_path / "checkpoint-10"


def test_oldest_checkpoints_go_beyond_the_limit(tmp_path):
    run = Run(tmp_path, total_limit=2)
    for step in (8, 9, 10, 11):
        run.checkpoints.save(step, SETTINGS)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]


def test_limit_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`checkpoints_total_limit` must be at least 1, got 0"):
        Run(tmp_path, total_limit=0)


def test_whenever_the_process_dies_the_latest_checkpoint_is_whole(tmp_path):
    """Step 1 is saved; saving step 2 and deleting step 1 is cut off at every moment."""
    run = Run(tmp_path, total_limit=1)
    states = {}
    for step in (1, 2):
        run.step()
        states[step] = run.state()
        if step == 1:
            run.checkpoints.save(1, SETTINGS)
    untouched = tmp_path.with_name("untouched")
    shutil.copytree(tmp_path, untouched)
    found = []

    def save():
        run.checkpoints.save(2, SETTINGS)

    def check():
        other = Run(tmp_path, seed=1)
        step = other.checkpoints.resume("latest", SETTINGS)
        assert_same(other.state(), states[step])
        found.append(step)
        shutil.rmtree(tmp_path)
        shutil.copytree(untouched, tmp_path)

    assert die_before_every_change(save, check) > 10
    assert found == sorted(found)
    assert set(found) == {1, 2}
    assert names(tmp_path) == ["checkpoint-2"]


def test_what_a_dead_process_left_is_cleared_and_replaced(tmp_path):
    """Every process goes on in what the one before left when it died."""
    run = Run(tmp_path, total_limit=1)
    run.checkpoints.save(1, SETTINGS)
    die_before_every_change(lambda: run.checkpoints.save(2, SETTINGS), lambda: None)
    assert names(tmp_path) == ["checkpoint-2"]
    assert Run(tmp_path).checkpoints.resume("latest", SETTINGS) == 2


@pytest.mark.parametrize("missing", ["training_state.json", ""])
def test_incomplete_checkpoint_is_refused_and_complete_ones_named(missing, tmp_path):
    run = Run(tmp_path)
    for step in (1, 2):
        run.checkpoints.save(step, SETTINGS)
    path = tmp_path / "checkpoint-2" / missing
    path.unlink() if missing else shutil.rmtree(path)
    with pytest.raises(ValueError, match=r"complete checkpoint or `latest`, got 'checkpoint-2'.*: checkpoint-1\."):
        run.checkpoints.resume("checkpoint-2", SETTINGS)
    assert run.checkpoints.resume("latest", SETTINGS) == 1


def test_averaging_run_needs_a_checkpoint_with_an_average(tmp_path):
    Run(tmp_path, use_ema=False).checkpoints.save(1, SETTINGS)
    with pytest.raises(ValueError, match=r"`use_ema` must be what it was: .*checkpoint-1 has no averaged weights"):
        Run(tmp_path).checkpoints.resume("latest", SETTINGS)


def test_run_does_not_go_back_behind_checkpoints_of_later_steps(tmp_path):
    run = Run(tmp_path)
    for step in (1, 2):
        run.checkpoints.save(step, SETTINGS)
    with pytest.raises(ValueError, match=r"'checkpoint-1' is of step 1, but .* holds checkpoint-2\. Remove"):
        run.checkpoints.resume("checkpoint-1", SETTINGS)
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert run.checkpoints.resume("checkpoint-1", SETTINGS) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(value, tmp_path):
    run = Run(tmp_path)
    run.checkpoints.save(1, SETTINGS)
    with torch.no_grad():
        next(run.model.parameters()).view(-1)[-1] = value
    with pytest.raises(FloatingPointError, match=r"weights were not finite at step 2\. .* is .*/checkpoint-1;"):
        run.checkpoints.save(2, SETTINGS)
    assert names(tmp_path) == ["checkpoint-1"]


def test_changed_settings_are_warned_about(tmp_path, caplog):
    Run(tmp_path).checkpoints.save(1, {"seed": 0, "num_images": 5})
    with caplog.at_level(logging.WARNING):
        Run(tmp_path).checkpoints.resume("latest", {"seed": 0, "num_images": 6})
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("diffusers_dtr")]
    assert [warning.split(":")[0] for warning in warnings] == ["`num_images` was 5 and is 6 now"]


def test_forward_calls_are_counted_anew_after_resuming(tmp_path):
    """With another number of them in a step, the first step would otherwise be cut short."""
    run = Run(tmp_path)
    run.accelerator.step = 3
    run.checkpoints.save(3, SETTINGS)
    other = Run(tmp_path)
    other.accelerator.gradient_accumulation_steps = 2
    other.checkpoints.resume("latest", SETTINGS)
    with other.accelerator.accumulate(other.prepared):
        assert not other.accelerator.sync_gradients


def test_state_file_tells_step_and_settings(tmp_path):
    path = Run(tmp_path).checkpoints.save(4, SETTINGS)
    assert json.loads((path / "training_state.json").read_text()) == {"global_step": 4, "settings": SETTINGS}


class AdaptedRun(Run):
    """A run that trains LoRA adapters."""

    def __init__(self, folder: Path, *, seed: int = 0, rank: int = 2):
        super().__init__(folder, use_ema=False)
        torch.manual_seed(seed)
        add_lora(self.model, Namespace(rank=rank, lora_alpha=None, lora_layers=None), ("to_q",))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.accelerator.free_memory()
        self.optimizer = self.accelerator.prepare(torch.optim.AdamW(trained, lr=0.1))

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        self.optimizer.step()


def test_adapters_alone_are_saved_and_restored(tmp_path):
    run = AdaptedRun(tmp_path)
    run.step()
    path = run.checkpoints.save(1, SETTINGS)
    weights = {name for file in path.rglob("*.safetensors") for name in load_file(file)}
    assert weights
    assert all("lora_" in name for name in weights)
    other = AdaptedRun(tmp_path, seed=1)
    other.checkpoints.resume("latest", SETTINGS)
    assert_same(other.state(), run.state())
    run.step()
    other.step()
    assert_same(other.state(), run.state())


def test_run_without_adapters_does_not_go_on_with_them_nor_the_other_way_round(tmp_path):
    AdaptedRun(tmp_path / "adapted").checkpoints.save(1, SETTINGS)
    with pytest.raises(ValueError, match=r"`rank` must be what it was: .*checkpoint-1 has no transformer to"):
        Run(tmp_path / "adapted", use_ema=False).checkpoints.resume("latest", SETTINGS)
    Run(tmp_path / "whole", use_ema=False).checkpoints.save(1, SETTINGS)
    with pytest.raises(ValueError, match=r"`rank` must be what it was: .*checkpoint-1 has no transformer_lora to"):
        AdaptedRun(tmp_path / "whole").checkpoints.resume("latest", SETTINGS)
