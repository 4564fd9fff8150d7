import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from run_config import run_config
from torch.optim.lr_scheduler import LambdaLR

from diffusers_dtr import cluster_timesteps
from diffusers_dtr.objective.clustered_loss import ClusteredLoss
from diffusers_dtr.training.config import OptimizerConfig
from diffusers_dtr.training.optimizer import build_lr_scheduler, build_optimizer, load_named_state, named_state


def optimizer_config(**changes) -> OptimizerConfig:
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
    config = optimizer_config(lr_scheduler=name, learning_rate=learning_rate, **given)
    plain = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=learning_rate)
    theirs = get_scheduler(name, plain, num_warmup_steps=3, num_training_steps=40, **options)
    assert run(config, make_optimizer(config), range(41), 40) == rates(plain, theirs, 41)


def test_learning_rate_is_scaled_as_a_whole():
    config = optimizer_config(lr_scheduler="polynomial", learning_rate=1e-4)
    scaled = make_optimizer(config, scale=8)
    assert scaled.defaults["lr"] == scaled.param_groups[0]["initial_lr"] == 8e-4
    larger = optimizer_config(lr_scheduler="polynomial", learning_rate=8e-4)
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
    config = optimizer_config(lr_scheduler=name)
    whole = run(config, make_optimizer(config), range(10))
    for start in range(1, 10):
        assert run(config, make_optimizer(config), range(start, 10)) == whole[start:]


def test_hyperparameters_are_the_flags():
    (group,) = make_optimizer(optimizer_config()).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.8, 0.9), 1e-6, 0.01)


def test_loaded_state_keeps_moments_and_steps_but_not_old_hyperparameters():
    config = optimizer_config()
    module = torch.nn.Linear(2, 2)
    old = make_optimizer(config, module=module)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    run(config, old, range(2))
    old.zero_grad()
    saved = {name: tensor.clone() for name, tensor in named_state(module, old).items()}
    assert sorted(saved)[:3] == ["state.bias.exp_avg", "state.bias.exp_avg_sq", "state.bias.step"]
    new = make_optimizer(optimizer_config(learning_rate=0.02, adam_beta1=0.5), module=module)
    load_named_state(module, new, lambda tensors: [tensor.copy_(saved[name]) for name, tensor in tensors.items()])
    assert [state["step"] for state in new.state.values()] == [2, 2]
    assert all(map(torch.equal, named_state(module, new).values(), saved.values()))
    assert new.param_groups[0]["betas"] == (0.5, 0.9)
    assert run(optimizer_config(learning_rate=0.02), new, range(5, 6))[0] == pytest.approx(
        0.2 * run(config, make_optimizer(config), range(5, 6))[0]
    )


def test_balancing_learns_at_a_rate_of_its_own_on_the_same_schedule():
    config, scheduler = optimizer_config(), DDPMScheduler()
    loss_fn = ClusteredLoss(scheduler, cluster_timesteps(scheduler, 2, "uniform"), balancing="uncertainty")
    balancing = build_optimizer(config, loss_fn.parameter_groups())
    assert balancing.param_groups[0]["initial_lr"] == 0.025
    factors = [
        [rate / rates[3] for rate in rates]
        for rates in (run(config, each, range(10)) for each in (balancing, make_optimizer(config)))
    ]
    assert factors[0] == pytest.approx(factors[1])
