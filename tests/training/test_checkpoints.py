import errno
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMScheduler
from run_config import run_config
from safetensors.torch import load_file, save_file
from sudden_death import die_before_every_change

from diffusers_dtr import DTRTransformer2DModel
from diffusers_dtr.training.config import EMAConfig, LoraConfig, RoutingConfig
from diffusers_dtr.training.ema import WeightAverage
from diffusers_dtr.training.engine import Engine
from diffusers_dtr.training.lora import add_lora
from diffusers_dtr.training.objective import build_objective
from diffusers_dtr.training.run.checkpoints import Checkpoints
from diffusers_dtr.training.run.resuming import RunState


SETTINGS = {"--seed": 0}


class Run:
    """A model, optimizer and average of a run, as a script has them."""

    def __init__(self, folder: Path, *, seed: int = 0, use_ema: bool = True, rank: int | None = None, limit: int = 9):
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(seed if rank is None else 0)  # adapters are of the same model
        size = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "sample_size": 4}
        self.model = DTRTransformer2DModel(**size, in_channels=1, num_embeds_ada_norm=2)
        if rank is not None:
            torch.manual_seed(seed)
            add_lora(self.model, LoraConfig(rank=rank), RoutingConfig(), ("to_q",))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        engine = Engine(self.accelerator, self.model)
        _, self.optimizer = engine.prepare(torch.optim.AdamW(trained, lr=0.1))
        self.ema = WeightAverage(EMAConfig(use_ema=True), engine) if use_ema else None
        self.checkpoints = Checkpoints(engine, folder, "transformer", limit)

    def save(self, step: int) -> Path:
        return self.checkpoints.save(RunState(step, SETTINGS), self.ema)

    def resume(self, name: str | None = "latest") -> int:
        """The step that the run goes on from."""
        state = self.checkpoints.resume(name, SETTINGS)
        self.checkpoints.restore(state, self.ema)
        return state.global_step

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        self.optimizer.step()
        if self.ema is not None:
            self.ema.step()

    def state(self) -> list[torch.Tensor]:
        shadow = [] if self.ema is None else self.ema.weights
        moments = [state["exp_avg"] for state in self.optimizer.state.values()]
        return [tensor.detach().clone() for tensor in [*self.model.parameters(), *shadow, *moments]]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert len(left) == len(right)
    assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_resuming_restores_model_average_and_optimizer(tmp_path):
    run = Run(tmp_path)
    run.step()
    run.save(1)
    expected = run.state()
    other = Run(tmp_path, seed=1)
    assert other.resume() == 1
    assert_same(other.state(), expected)
    run.step()
    other.step()
    assert_same(other.state(), run.state())
    assert other.ema.num_steps == 2


def test_weights_are_saved_once_and_as_safetensors_of_the_model(tmp_path):
    run = Run(tmp_path)
    path = run.save(1)
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*.safetensors"))
    assert files == [
        "optimizer/shard-00001-model-00001-of-00001.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer_ema/diffusion_pytorch_model.safetensors",
    ]
    saved = DTRTransformer2DModel.from_pretrained(path / "transformer")
    assert_same(list(saved.parameters()), list(run.model.parameters()))


def test_nothing_is_loaded_unless_asked_or_there(tmp_path):
    run = Run(tmp_path)
    run.step()
    before = run.state()
    assert run.resume() == 0
    run.save(1)
    assert run.resume(None) == 0
    assert_same(run.state(), before)


def test_oldest_checkpoints_go_beyond_the_limit_by_their_steps_rather_than_their_names(tmp_path):
    run = Run(tmp_path, limit=2)
    for step in (8, 9, 10, 11):
        run.save(step)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]
    assert run.checkpoints.latest() == tmp_path / "checkpoint-11"


def test_a_link_to_a_checkpoint_counts_and_what_it_leads_to_stays(tmp_path):
    run, elsewhere = Run(tmp_path / "run", limit=1), Run(tmp_path / "elsewhere").save(1)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "checkpoint-1").symlink_to(elsewhere)
    for step in (2, 3):
        run.save(step)
    assert names(tmp_path / "run") == ["checkpoint-3"]
    assert (elsewhere / "training_state.json").is_file()


def test_whenever_the_process_dies_the_latest_checkpoint_is_whole(tmp_path):
    """Step 1 is saved; saving step 2 and deleting step 1 is cut off at every moment."""
    run = Run(tmp_path, limit=1)
    states = {}
    for step in (1, 2):
        run.step()
        states[step] = run.state()
        if step == 1:
            run.save(1)
    untouched = tmp_path.with_name("untouched")
    shutil.copytree(tmp_path, untouched)
    found = []

    def save():
        run.save(2)

    def check():
        other = Run(tmp_path, seed=1)
        step = other.resume()
        assert_same(other.state(), states[step])
        found.append(step)
        shutil.rmtree(tmp_path)
        shutil.copytree(untouched, tmp_path)

    assert die_before_every_change(save, check) > 10
    assert found == sorted(found)
    assert set(found) == {1, 2}
    assert names(tmp_path) == ["checkpoint-2"]


def test_incomplete_checkpoint_is_refused_and_complete_ones_named(tmp_path):
    run = Run(tmp_path)
    for step in (1, 2):
        run.save(step)
    (tmp_path / "checkpoint-2" / "training_state.json").unlink()
    for name in ("checkpoint-2", "checkpoint-3"):
        with pytest.raises(ValueError, match=rf"complete checkpoint or `latest`, got '{name}'.*: checkpoint-1\."):
            run.resume(name)
    assert run.resume() == 1


@pytest.mark.parametrize(
    ("saved", "resumed", "message"),
    [
        ({}, {"use_ema": True}, "`use_ema` must be what it was: .*checkpoint-1 has no transformer_ema to"),
        ({"rank": 2}, {}, "`rank` must be what it was: .*checkpoint-1 has no transformer to"),
        ({}, {"rank": 2}, "`rank` must be what it was: .*checkpoint-1 has no transformer_lora to"),
    ],
)
def test_what_a_run_needs_to_go_on_must_be_there(saved, resumed, message, tmp_path):
    without = {"use_ema": False}
    Run(tmp_path, **{**without, **saved}).save(1)
    with pytest.raises(ValueError, match=message):
        Run(tmp_path, **{**without, **resumed}).resume()


def test_checkpoint_of_a_version_that_saved_optimizers_otherwise_is_refused(tmp_path):
    path = Run(tmp_path).save(1)
    (path / "optimizer").rename(path / "optimizer.bin")
    with pytest.raises(ValueError, match=r"of another version of this library: the checkpoint .* has no optimizer to"):
        Run(tmp_path).resume()


def test_run_does_not_go_back_behind_checkpoints_of_later_steps(tmp_path):
    run = Run(tmp_path)
    for step in (1, 2):
        run.save(step)
    with pytest.raises(ValueError, match=r"'checkpoint-1' is of step 1, but .* holds checkpoint-2\. Remove"):
        run.resume("checkpoint-1")
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert run.resume("checkpoint-1") == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(value, tmp_path):
    run = Run(tmp_path)
    run.save(1)
    with torch.no_grad():
        next(run.model.parameters()).view(-1)[-1] = value
    with pytest.raises(FloatingPointError, match=r"weights were not finite at step 2\. .* is .*/checkpoint-1;"):
        run.save(2)
    assert names(tmp_path) == ["checkpoint-1"]


def test_weights_of_another_model_or_damaged_ones_are_refused(tmp_path):
    folder = Run(tmp_path).save(1)

    def refused(name: str, message: str) -> None:
        with pytest.raises(ValueError, match=f"{name} must hold {message}"):
            Run(tmp_path).resume()

    for name in ("transformer_ema", "transformer"):
        file = folder / name / "diffusion_pytorch_model.safetensors"
        whole = file.read_bytes()
        save_file({"other": torch.zeros(1)}, file)
        refused(name, "the tensors of this model, and all their shards: .* are others, or in part")
        file.write_bytes(b"cut off")
        refused(name, "whole safetensors files")
        file.unlink()
        refused(name, r"\*\.safetensors, but has none")
        file.write_bytes(whole)


def test_where_a_file_is_damaged_other_checkpoints_are_named(tmp_path):
    run = Run(tmp_path)
    for step in (1, 2):
        run.step()
        run.save(step)
    for file in sorted((tmp_path / "checkpoint-2").rglob("*.safetensors")):
        whole = file.read_bytes()
        file.write_bytes(whole[:100])
        with pytest.raises(ValueError, match=rf"{file.parent.name}.*one can go on with checkpoint-1\."):
            Run(tmp_path).resume()
        file.write_bytes(whole)
    assert Run(tmp_path).resume() == 2


def test_a_full_disk_is_told_with_what_to_go_on_from(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.save(1)

    def write(state: RunState, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunState, "write", write)
    with pytest.raises(OSError, match=r"step 2 cannot be written: .*No space left.* complete one is .*checkpoint-1\."):
        run.save(2)
    assert names(tmp_path) == ["checkpoint-1"]


def test_adapters_alone_are_saved_and_restored(tmp_path):
    run, other = (Run(tmp_path, seed=seed, use_ema=False, rank=2) for seed in (0, 1))
    run.step()
    path = run.save(1)
    weights = {name for file in path.rglob("*.safetensors") for name in load_file(file)}
    assert weights
    assert all("lora_" in name for name in weights)
    other.resume()
    assert_same(other.state(), run.state())
    run.step()
    other.step()
    assert_same(other.state(), run.state())


class StatefulRun(Run):
    """A run whose objective has a state too."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        config = run_config(balancing="uncertainty", timestep_sampling="loss")
        self.checkpoints.objective = build_objective(config, DDPMScheduler(), self.model, self.accelerator)


class Gadget:
    """Runs code where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


# What accelerate, diffusers and torch would look for, beside what such a checkpoint has.
PLANTED = [
    *(
        "optimizer.bin",
        "random_states_0.pkl",
        "custom_checkpoint_0.pkl",
        "scheduler.bin",
        "sampler.bin",
        "scaler.pt",
        "model.safetensors",
        "pytorch_model.bin",
    ),
    *("transformer/diffusion_pytorch_model.bin", "transformer_ema/diffusion_pytorch_model.bin"),
]


@pytest.mark.parametrize("as_torch", [False, True])
def test_no_file_of_a_checkpoint_runs_code(as_torch, tmp_path):
    marker, gadget = tmp_path / "executed", tmp_path / "gadget"
    torch.save(Gadget(marker), gadget) if as_torch else gadget.write_bytes(pickle.dumps(Gadget(marker)))
    torch.load(gadget, weights_only=False) if as_torch else pickle.loads(gadget.read_bytes())
    marker.rmdir()
    whole = StatefulRun(tmp_path / "whole").save(1)
    files = [str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()]
    assert {"objective.safetensors", "training_state.json"} < set(files)
    for number, name in enumerate([*files, *PLANTED]):
        hostile = tmp_path / str(number) / "checkpoint-1"
        shutil.copytree(whole, hostile)
        if Path(name).suffix == ".bin":  # found where there are no safetensors
            for file in (hostile / name).parent.glob("*.safetensors"):
                file.unlink()
        shutil.copyfile(gadget, hostile / name)
        run = StatefulRun(tmp_path / "run")
        with suppress(ValueError, RuntimeError, EOFError, pickle.UnpicklingError):
            run.resume(str(hostile))
        assert not marker.exists(), name
