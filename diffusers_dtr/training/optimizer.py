"""The optimizer and the learning rate that the flags ask for, from the start and after resuming alike."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from ..objective.clustered_loss import ClusteredLoss
from .config import OptimizerConfig


def build_optimizer(
    config: OptimizerConfig, model: torch.nn.Module, loss_fn: ClusteredLoss, scale: float = 1.0
) -> torch.optim.AdamW:
    """AdamW with the hyperparameters of the flags, where PyTorch would restore those of a checkpoint."""
    learning_rate = config.learning_rate * scale
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained, "lr": learning_rate}, *loss_fn.parameter_groups()]
    optimizer = torch.optim.AdamW(
        # A learning rate schedule that begins in the middle takes the peak from here.
        [{**group, "initial_lr": group["lr"]} for group in groups],
        # From here the polynomial schedule takes what its end is relative to.
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    optimizer.register_load_state_dict_pre_hook(_keep_hyperparameters)
    return optimizer


def build_lr_scheduler(
    config: OptimizerConfig, optimizer: torch.optim.Optimizer, num_steps: int, global_step: int
) -> LambdaLR:
    """The learning rate as a function of the step alone; not to be given to `Accelerator.prepare`."""
    given = {name: vars(config).get(f"lr_{name}") for name in ("num_cycles", "power")}
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=num_steps,
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
