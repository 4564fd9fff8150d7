import argparse

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_dtr import cluster_timesteps
from diffusers_dtr.objective.clustered_loss import ClusteredLoss
from diffusers_dtr.training.optimizer import build_lr_scheduler, build_optimizer


def flags(**changes) -> argparse.Namespace:
    values = {
        "learning_rate": 0.1,
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "adam_weight_decay": 0.01,
        "adam_epsilon": 1e-6,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 3,
        "max_train_steps": 10,
    }
    return argparse.Namespace(**{**values, **changes})


def make_optimizer(args: argparse.Namespace, balancing: str = "uniform") -> torch.optim.AdamW:
    scheduler = DDPMScheduler()
    loss_fn = ClusteredLoss(scheduler, cluster_timesteps(scheduler, 2, "uniform"), balancing=balancing)
    return build_optimizer(args, torch.nn.Linear(2, 2), loss_fn)


def run(args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    scheduler = build_lr_scheduler(args, optimizer, steps.start)
    rates = []
    for _ in steps:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "polynomial"])
def test_learning_rate_begun_in_the_middle_is_that_of_the_whole_run_to_the_bit(name):
    args = flags(lr_scheduler=name)
    whole = run(args, make_optimizer(args), range(10))
    for start in range(1, 10):
        assert run(args, make_optimizer(args), range(start, 10)) == whole[start:]


def test_learning_rate_rises_to_its_peak_and_falls():
    args = flags()
    rates = run(args, make_optimizer(args), range(10))
    assert rates[0] == 0
    assert rates[3] == max(rates) == 0.1
    assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True)


def test_hyperparameters_are_the_flags():
    (group,) = make_optimizer(flags()).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.8, 0.9), 1e-6, 0.01)


def test_loaded_state_keeps_moments_and_steps_but_not_old_hyperparameters():
    args = flags()
    old = make_optimizer(args)
    for parameter in old.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    run(args, old, range(2))
    new = make_optimizer(flags(learning_rate=0.02, adam_beta1=0.5))
    new.load_state_dict(old.state_dict())
    assert [state["step"] for state in new.state.values()] == [2, 2]
    assert new.param_groups[0]["betas"] == (0.5, 0.9)
    assert run(flags(learning_rate=0.02), new, range(5, 6))[0] == pytest.approx(
        0.2 * run(args, make_optimizer(args), range(5, 6))[0]
    )


def test_balancing_learns_at_a_rate_of_its_own():
    rates = [group["initial_lr"] for group in make_optimizer(flags(), "uncertainty").param_groups]
    assert rates[0] == 0.1
    assert len(rates) == 2
    assert rates[1] != 0.1
