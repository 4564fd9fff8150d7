"""Every optimizer trains, and goes on from a saved state to the bit."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from run_config import run_config
from safetensors.torch import save_file
from torch import nn

from diffusers_dtr.training.config import OptimizerConfig, learning
from diffusers_dtr.training.engine import read_tensors
from diffusers_dtr.training.optimizer import build_lr_scheduler, build_model_optimizer, load_named_state, named_state
from diffusers_dtr.training.run.start import _check_engine


PACKAGES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt"}
LEARNING_RATES = {"adamw": 1e-2, "adamw_8bit": 1e-2, "adafactor": 0.2, "prodigy": 1.0, "muon": 1e-2}
every_optimizer = pytest.mark.parametrize("name", LEARNING_RATES)


def optimizer_config(name: str, **changes) -> OptimizerConfig:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return OptimizerConfig(optimizer=name, learning_rate=LEARNING_RATES[name], adam_weight_decay=0.01, **changes)


class Tiny(nn.Module):
    """With what optimizers treat differently: an embedding, a convolution, matrices, one of which begins at zero."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 64)
        self.first, self.last = nn.Linear(64, 80), nn.Linear(80, 2)
        self.conv = nn.Conv1d(1, 2, 3)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        nn.init.zeros_(self.last.weight)

    def forward(self, label):
        hidden = self.first(self.embedding(label))
        return self.frozen(self.last(hidden)) + self.conv(hidden[:, None]).mean(2)


class Run:
    def __init__(self, config: OptimizerConfig, seed: int = 0):
        torch.manual_seed(seed)
        self.model = Tiny()
        self.config, self.optimizer = config, build_model_optimizer(config, self.model)

    def train(self, steps: range) -> list[float]:
        scheduler = build_lr_scheduler(self.config, self.optimizer, 40, steps.start)
        losses = []
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            loss = (self.model(torch.randint(5, (8,), generator=generator)) - 1).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            scheduler.step()
            losses.append(loss.item())
        return losses

    def go_on_from(self, other: "Run", folder) -> None:
        self.model.load_state_dict(copy.deepcopy(other.model.state_dict()))
        save_file(
            {name: value.clone() for name, value in named_state(other.model, other.optimizer).items()},
            folder / "a.safetensors",
        )
        load_named_state(self.model, self.optimizer, partial(read_tensors, folder))


@every_optimizer
def test_a_resumed_optimizer_goes_on_to_the_bit(name, tmp_path):
    config = optimizer_config(name, lr_scheduler="cosine")
    run, resumed = Run(config), Run(config, seed=1)
    run.train(range(7))
    resumed.go_on_from(run, tmp_path)
    assert run.train(range(7, 15)) == resumed.train(range(7, 15))
    for (key, one), other in zip(run.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


@every_optimizer
def test_every_optimizer_learns_and_leaves_frozen_weights(name):
    run = Run(optimizer_config(name))
    before = copy.deepcopy(run.model.state_dict())
    losses = run.train(range(100))
    assert losses[-1] < 0.5 * losses[0]
    same = {key for key, value in run.model.state_dict().items() if torch.equal(value, before[key])}
    assert same == {"frozen.weight", "frozen.bias"}


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_an_optimizer_whose_package_is_missing_is_refused(name, package, monkeypatch):
    monkeypatch.setattr(learning, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=rf"`--optimizer {name}` needs {package}: pip install .*\[optimizers\]"):
        OptimizerConfig(optimizer=name)


@pytest.mark.parametrize(
    ("engine", "name", "message"),
    [
        (DistributedType.FSDP, "adafactor", "`--optimizer` must be adamw or muon under FSDP, got adafactor"),
        (DistributedType.DEEPSPEED, "muon", "`--optimizer` must be adamw under DEEPSPEED, got muon"),
    ],
)
def test_engines_refuse_optimizers_that_they_cannot_shard(engine, name, message):
    accelerator = SimpleNamespace(
        distributed_type=engine, is_fsdp2=True, gradient_state=SimpleNamespace(plugin_kwargs={})
    )
    with pytest.raises(ValueError, match=message):
        _check_engine(run_config(optimizer=name), accelerator)


def test_muon_is_for_matrices_that_are_no_embeddings():
    model = Tiny()
    muon, rest = build_model_optimizer(OptimizerConfig(optimizer="muon"), model).param_groups
    assert {id(parameter) for parameter in muon["params"]} == {id(model.first.weight), id(model.last.weight)}
    assert len(rest["params"]) == 5


def test_hyperparameters_are_the_flags_for_all():
    for name, keys in {"adafactor": {}, "muon": {"betas", "eps"}}.items():
        adam = {"adam_beta1": 0.5, "adam_epsilon": 1e-3} if keys else {}
        config = OptimizerConfig(optimizer=name, learning_rate=0.1, adam_weight_decay=0.3, **adam)
        groups = build_model_optimizer(config, Tiny(), scale=2).param_groups
        assert {(group["lr"], group["initial_lr"], group["weight_decay"]) for group in groups} == {(0.2, 0.2, 0.3)}
        if keys:
            assert (groups[-1]["betas"], groups[-1]["eps"]) == ((0.5, 0.999), 1e-3)
