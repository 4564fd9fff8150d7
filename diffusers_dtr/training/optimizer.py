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
from .muon import MuonAdamW


StateReader = Callable[[dict[str, Tensor]], None]

_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)
# What Prodigy keeps in its parameter groups, beside hyperparameters: its estimate of the distance, and of what.
_LEARNED_BY_GROUPS = {"d", "d_max", "d_numerator", "k"}


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


def build_model_optimizer(config: OptimizerConfig, model: nn.Module, scale: float = 1.0) -> torch.optim.Optimizer:
    """The optimizer of `--optimizer` for the trained parameters of a model."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "adamw":
        return build_optimizer(config, [{"params": trained}], scale)
    learning_rate = config.learning_rate * scale
    groups = [{"params": trained, "initial_lr": learning_rate}]
    common = {"lr": learning_rate, "weight_decay": config.adam_weight_decay}
    adam = {**common, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if config.optimizer == "muon":
        return MuonAdamW(model, **adam)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, **common)
    return _adamw_8bit(groups, **adam) if config.optimizer == "adamw_8bit" else _prodigy(groups, **adam)


def _adamw_8bit(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    class FlatAdamW8bit(AdamW8bit):
        state_dict = torch.optim.Optimizer.state_dict  # its own hides tensors from FSDP 1, and from saving by name

    return FlatAdamW8bit(groups, **options)


def _prodigy(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    # As diffusers' training scripts have it.
    optimizer = Prodigy(groups, use_bias_correction=True, safeguard_warmup=True, **options)
    optimizer.register_step_post_hook(_with_whole_beginnings)
    return optimizer


def _with_whole_beginnings(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Prodigy remembers weights that began at zero as one number, which a resumed run, whose are not, cannot read."""
    for parameter, state in optimizer.state.items():
        if state["p0"].dim() == 0:
            state["p0"] = state["p0"].new_zeros(parameter.numel())


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

    What it estimates in its parameter groups is called `param_groups.<parameter>.<what>`. Numbers are vectors of one,
    which safetensors files have. Tensors are no copies: what is written into them is part of the state, where that was
    there before.
    """
    return {} if optimizer is None else _learned(_state_dict(module, optimizer))


def load_named_state(module: nn.Module, optimizer: torch.optim.Optimizer | None, read: StateReader) -> None:
    """Go on with the state that `read` writes into tensors like those of [`named_state`].

    The hyperparameters stay: a run that is resumed with a lower learning rate goes on with that.
    """
    if optimizer is not None:
        state = _state_dict(module, optimizer)
        learned = _learned(state)
        read(learned)
        numbers = {name: value.item() for name, value in learned.items() if not torch.is_tensor(state[name])}
        set_optimizer_state_dict(module, optimizer, state | numbers, options=_BY_NAME)
        for parameter, own in [*optimizer.state.items()]:
            if "step" in own and not own["step"]:  # it never had a gradient
                del optimizer.state[parameter]


def _state_dict(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return get_optimizer_state_dict(module, optimizer, options=_BY_NAME)


def _learned(state: dict[str, Any]) -> dict[str, Tensor]:
    names = [name for name in state if name.startswith("state.") or name.rpartition(".")[2] in _LEARNED_BY_GROUPS]
    return {name: _as_vector(state[name]) for name in names}


def _as_vector(value: Tensor | float) -> Tensor:
    if not torch.is_tensor(value):
        return torch.tensor([value], dtype=torch.float64 if isinstance(value, float) else torch.int64)
    return value if value.dim() else value.reshape(1)
