"""The optimizer and the learning rate that the flags ask for, from the start and after resuming alike."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from ..objective.clustered_loss import ClusteredLoss


# Where diffusers' polynomial schedule ends; it must begin above.
POLYNOMIAL_END = 1e-7


def build_optimizer(
    args: argparse.Namespace, model: torch.nn.Module, loss_fn: ClusteredLoss, scale: float = 1.0
) -> torch.optim.AdamW:
    """AdamW with the hyperparameters of the flags, which loading a checkpoint leaves as they are.

    PyTorch would restore the old ones: a run that is resumed with a lower learning rate would go on with the old.

    Args:
        args: Parsed flags of [`add_optimization_arguments`].
        model: What of it requires gradients is optimized, with the flags' hyperparameters.
        loss_fn: What its balancing learns is optimized too, with the balancing's own.
        scale: What `--learning_rate` is multiplied by.
    """
    learning_rate = args.learning_rate * scale
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained, "lr": learning_rate}, *loss_fn.parameter_groups()]
    optimizer = torch.optim.AdamW(
        # A learning rate schedule that begins in the middle takes the peak from here.
        [{**group, "initial_lr": group["lr"]} for group in groups],
        # From here the polynomial schedule takes what its end is relative to.
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    optimizer.register_load_state_dict_pre_hook(_keep_hyperparameters)
    return optimizer


def check_warm_ups(args: argparse.Namespace) -> None:
    """Refuse what would rise or fall until after the run.

    Args:
        args: Parsed flags; `max_train_steps` is a number by now.

    Raises:
        ValueError: Naming the flag, its value and the number of steps.
    """
    steps = args.max_train_steps
    if args.lr_warmup_steps >= steps:
        raise ValueError(
            f"`--lr_warmup_steps` must be below the {steps} steps of the run, got {args.lr_warmup_steps}: the "
            "learning rate would never be at its peak."
        )
    if args.routing_warmup_steps > steps:
        raise ValueError(
            f"`--routing_warmup_steps` must be at most the {steps} steps of the run, got {args.routing_warmup_steps}: "
            "it would end before its target."
        )


def build_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, global_step: int) -> LambdaLR:
    """The learning rate as a function of the step alone; not to be given to `Accelerator.prepare`.

    Args:
        args: Parsed flags; `max_train_steps` is a number by now.
        optimizer: Of [`build_optimizer`], as it came from `Accelerator.prepare`.
        global_step: Optimizer steps already done.
    """
    given = {name: vars(args).get(f"lr_{name}") for name in ("num_cycles", "power")}
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        last_epoch=global_step - 1,
        **{name: value for name, value in given.items() if value is not None},
    )


def _keep_hyperparameters(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    own, saved = optimizer.param_groups, state_dict["param_groups"]
    if len(own) != len(saved):
        raise ValueError(
            f"The saved optimizer must have as many parameter groups as this one, {len(own)}, got {len(saved)}: "
            "`--balancing`, whose parameters are one, must be what it was."
        )
    groups = [{**mine, "params": theirs["params"]} for mine, theirs in zip(own, saved, strict=True)]
    return {**state_dict, "param_groups": groups}
