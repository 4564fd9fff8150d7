"""Optimizers and their learning rates: every one trains, and goes on from a saved state to the bit."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from run_config import run_config
from safetensors.torch import save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from diffusers_dtr import cluster_timesteps
from diffusers_dtr.objective.clustered_loss import ClusteredLoss
from diffusers_dtr.training.config import OptimizerConfig, learning
from diffusers_dtr.training.engine import read_state
from diffusers_dtr.training.optimizer import (
    build_lr_scheduler,
    build_model_optimizer,
    build_optimizer,
    load_named_state,
    named_state,
)
from diffusers_dtr.training.run.start import _check_engine


PACKAGES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt"}
LEARNING_RATES = {"adamw": 1e-2, "adamw_8bit": 1e-2, "adafactor": 0.2, "prodigy": 1.0, "muon": 1e-2}
every_optimizer = pytest.mark.parametrize("name", LEARNING_RATES)


def adamw_config(**changes) -> OptimizerConfig:
    values = {"learning_rate": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_weight_decay": 0.01}
    values |= {"adam_epsilon": 1e-6, "lr_scheduler": "cosine", "lr_warmup_steps": 3} | changes
    return OptimizerConfig(**values | ({"lr_warmup_steps": 0} if values["lr_scheduler"] == "constant" else {}))


def make_optimizer(config: OptimizerConfig, scale: float = 1.0, module: torch.nn.Module | None = None, **group):
    module = module or torch.nn.Linear(2, 2)
    return build_optimizer(config, [{"params": list(module.parameters()), **group}], scale)


def rates(optimizer: torch.optim.Optimizer, scheduler: LambdaLR, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def run(config: OptimizerConfig, optimizer: torch.optim.Optimizer, steps: range, num_steps: int = 10) -> list[float]:
    return rates(optimizer, build_lr_scheduler(config, optimizer, num_steps, steps.start), len(steps))


SCHEDULES = [
    *((name, {}) for name in ("constant", "constant_with_warmup", "linear", "cosine")),
    ("cosine_with_restarts", {"num_cycles": 3}),
    *(("polynomial", options) for options in ({}, {"power": 2.5})),
]


@pytest.mark.parametrize("learning_rate", [0.1, 2e-7])
@pytest.mark.parametrize(("name", "options"), SCHEDULES)
def test_every_schedule_is_that_of_diffusers_over_the_whole_run(name, options, learning_rate):
    given = {f"lr_{option}": value for option, value in options.items()}
    config = adamw_config(lr_scheduler=name, learning_rate=learning_rate, **given)
    plain = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=learning_rate)
    theirs = get_scheduler(name, plain, num_warmup_steps=3, num_training_steps=40, **options)
    assert run(config, make_optimizer(config), range(41), 40) == rates(plain, theirs, 41)


def test_learning_rate_is_scaled_as_a_whole():
    config = adamw_config(lr_scheduler="polynomial", learning_rate=1e-4)
    scaled = make_optimizer(config, scale=8)
    assert scaled.defaults["lr"] == scaled.param_groups[0]["initial_lr"] == 8e-4
    larger = adamw_config(lr_scheduler="polynomial", learning_rate=8e-4)
    assert run(config, scaled, range(10)) == run(larger, make_optimizer(larger), range(10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_warmup_steps": 10}, "`--lr_warmup_steps` must be below the 10 steps of the run, got 10"),
        ({"routing_warmup_steps": 11}, "`--routing_warmup_steps` must be at most the 10 steps of the run, got 11"),
    ],
)
def test_warm_ups_end_within_the_run(changes, message):
    config = run_config(lr_scheduler="cosine", lr_warmup_steps=9, routing_warmup_steps=10, num_train_epochs=5)
    assert config.with_max_train_steps(8, 4).run.max_train_steps == 10
    with pytest.raises(ValueError, match=message):
        config.replace(**changes).with_max_train_steps(8, 4)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "polynomial"])
def test_learning_rate_begun_in_the_middle_is_that_of_the_whole_run_to_the_bit(name):
    config = adamw_config(lr_scheduler=name)
    whole = run(config, make_optimizer(config), range(10))
    for start in range(1, 10):
        assert run(config, make_optimizer(config), range(start, 10)) == whole[start:]


def test_loaded_state_keeps_moments_and_steps_but_not_old_hyperparameters():
    config = adamw_config()
    module = torch.nn.Linear(2, 2)
    old = make_optimizer(config, module=module)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    run(config, old, range(2))
    old.zero_grad()
    saved = {name: tensor.clone() for name, tensor in named_state(module, old).items()}
    assert sorted(saved)[:3] == ["state.bias.exp_avg", "state.bias.exp_avg_sq", "state.bias.step"]
    new = make_optimizer(adamw_config(learning_rate=0.02, adam_beta1=0.5), module=module)
    load_named_state(module, new, lambda tensors: [tensor.copy_(saved[name]) for name, tensor in tensors.items()])
    assert [state["step"] for state in new.state.values()] == [2, 2]
    assert all(map(torch.equal, named_state(module, new).values(), saved.values()))
    assert new.param_groups[0]["betas"] == (0.5, 0.9)
    assert run(adamw_config(learning_rate=0.02), new, range(5, 6))[0] == pytest.approx(
        0.2 * run(config, make_optimizer(config), range(5, 6))[0]
    )


def test_balancing_learns_at_a_rate_of_its_own_on_the_same_schedule():
    config, scheduler = adamw_config(), DDPMScheduler()
    loss_fn = ClusteredLoss(scheduler, cluster_timesteps(scheduler, 2, "uniform"), balancing="uncertainty")
    balancing = build_optimizer(config, loss_fn.parameter_groups())
    assert balancing.param_groups[0]["initial_lr"] == 0.025
    factors = [
        [rate / rates[3] for rate in rates]
        for rates in (run(config, each, range(10)) for each in (balancing, make_optimizer(config)))
    ]
    assert factors[0] == pytest.approx(factors[1])


# --- every optimizer -------------------------------------------------------------------------------------------------


def optimizer_config(name: str, **changes) -> OptimizerConfig:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return OptimizerConfig(optimizer=name, learning_rate=LEARNING_RATES[name], adam_weight_decay=0.01, **changes)


class Tiny(nn.Module):
    """With what optimizers treat differently: an embedding, a convolution, matrices, one of which begins at zero.

    Nothing flows through `late` at first, as through layers of a denoiser whose output nobody uses.
    """

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 64)
        self.first, self.last = nn.Linear(64, 80), nn.Linear(80, 2)
        self.conv, self.late = nn.Conv1d(1, 2, 3), nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        nn.init.zeros_(self.last.weight)

    def forward(self, label, is_late):
        hidden = self.first(self.embedding(label))
        output = self.frozen(self.last(hidden)) + self.conv(hidden[:, None]).mean(2)
        return self.late(output) if is_late else output


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
            loss = (self.model(torch.randint(5, (8,), generator=generator), step > 10) - 1).square().mean()
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
        load_named_state(self.model, self.optimizer, partial(read_state, folder))


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
    matrices = {id(layer.weight) for layer in (model.first, model.last, model.late)}
    assert {id(parameter) for parameter in muon["params"]} == matrices
    assert len(rest["params"]) == 6


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_hyperparameters_are_the_flags(name):
    adam = {} if name == "adafactor" else {"adam_beta1": 0.5, "adam_epsilon": 1e-3}
    config = OptimizerConfig(optimizer=name, learning_rate=0.1, adam_weight_decay=0.3, **adam)
    groups = build_model_optimizer(config, Tiny(), scale=2).param_groups
    assert {(group["lr"], group["initial_lr"], group["weight_decay"]) for group in groups} == {(0.2, 0.2, 0.3)}
    if adam:
        assert (groups[-1]["betas"], groups[-1]["eps"]) == ((0.5, 0.999), 1e-3)
