"""The optimizer and the learning rate that the flags ask for, from the start and after resuming alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

from .config import OptimizerConfig


StateReader = Callable[[dict[str, Tensor]], None]

_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def build_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]], scale: float = 1.0) -> torch.optim.AdamW:
    """AdamW of some parameter groups, with the hyperparameters of the flags where a group has none of its own."""
    learning_rate = config.learning_rate * scale
    return torch.optim.AdamW(
        # A learning rate schedule that begins in the middle takes the peak from here.
        [{**group, "initial_lr": group.get("lr", learning_rate)} for group in groups],
        # From here the polynomial schedule takes what its end is relative to.
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )


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


def named_state(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """What an optimizer has learned of a module's parameters, by `state.<parameter>.<what>`; as DTensors of some.

    Numbers are vectors of one, which safetensors files have. Nothing is a copy: what is written into a tensor is part
    of the state, where that was there before.
    """
    return {} if optimizer is None else _learned(_state_dict(module, optimizer))


def load_named_state(module: nn.Module, optimizer: torch.optim.Optimizer | None, read: StateReader) -> None:
    """Go on with the state that `read` writes into tensors like those of [`named_state`].

    The hyperparameters stay: a run that is resumed with a lower learning rate goes on with that.
    """
    if optimizer is not None:
        state = _state_dict(module, optimizer)
        read(_learned(state))
        set_optimizer_state_dict(module, optimizer, state, options=_BY_NAME)


def _state_dict(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return get_optimizer_state_dict(module, optimizer, options=_BY_NAME)


def _learned(state: dict[str, Any]) -> dict[str, Tensor]:
    learned = {name: value for name, value in state.items() if name.startswith("state.") and torch.is_tensor(value)}
    return {name: value if value.dim() else value.reshape(1) for name, value in learned.items()}
