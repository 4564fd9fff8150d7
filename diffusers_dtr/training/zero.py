"""What DeepSpeed's ZeRO makes of parameters and their optimizer: parts, float32 masters and moments.

DeepSpeed is imported where it is in use. Of a parameter that ZeRO-3 has partitioned, the attributes `ds_*` tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn


_MOMENTS = ("exp_avg", "exp_avg_sq")


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds it in parts."""
    return hasattr(parameter, "ds_id")


def local_part(parameter: nn.Parameter) -> Tensor:
    """What this process trains of a partitioned parameter, padded, in float32."""
    from deepspeed.utils import safe_get_local_fp32_param

    return safe_get_local_fp32_param(parameter)


def master(parameter: nn.Parameter) -> Tensor:
    """A trained parameter, whole, in float32."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def set_master(parameter: nn.Parameter, value: Tensor) -> None:
    """Train a parameter on from a whole value in float32, which the model's own may be too coarse for."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if is_partitioned(parameter):
        part = torch.empty_like(local_part(parameter))
        scatter(value, part)
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_full_fp32_param(parameter, value)


@torch.no_grad()
def gather(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """Put together what every process holds in the way of [`local_part`]."""
    padded = part.new_empty(part.numel() * dist.get_world_size())
    # Its name until torch 2.12, which warns of it from 2.13 on.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(padded, part.contiguous())
    return padded[: parameter.ds_numel].view(parameter.ds_shape)


@torch.no_grad()
def scatter(whole: Tensor, part: Tensor) -> None:
    """Fill a part with what is this process's: the inverse of [`gather`]."""
    padded = part.new_zeros(part.numel() * dist.get_world_size())
    padded[: whole.numel()] = whole.flatten()
    part.copy_(padded.view(-1, part.numel())[dist.get_rank()])


def whole(parameter: nn.Parameter) -> Tensor:
    """A partitioned parameter, whole, as the model computes with it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


@torch.no_grad()
def put(parameter: nn.Parameter, value: Tensor) -> None:
    """Let the model compute with another value of a partitioned parameter, which is not what it trains on from."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)


def optimizer_state(optimizer: object, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Adam's moments and steps of every parameter, whole, by the names of torch's `get_optimizer_state_dict`."""
    from deepspeed.utils import safe_get_full_optimizer_state

    step = optimizer.optimizer.state[_flat_groups(optimizer)[0]]["step"]
    state = {f"state.{name}.step": torch.full((1,), float(step)) for name in parameters}
    for name, parameter in parameters.items():
        state |= {f"state.{name}.{moment}": safe_get_full_optimizer_state(parameter, moment) for moment in _MOMENTS}
    return state


def load_optimizer_state(
    optimizer: object, parameters: Mapping[str, nn.Parameter], read: Callable[[dict[str, Tensor]], None]
) -> None:
    """Give the optimizer the state that `read` fills tensors with, before its first step."""
    from deepspeed.utils import (
        safe_get_local_optimizer_state,
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    # Before its first step it has no state, and no public way to make one.
    for flat in _flat_groups(optimizer):
        moments = {moment: torch.zeros_like(flat) for moment in _MOMENTS}
        optimizer.optimizer.state[flat] = {"step": torch.zeros(()), **moments}
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()
    state = optimizer_state(optimizer, parameters)
    read(state)
    for name, parameter in parameters.items():
        for moment in _MOMENTS:
            value = state[f"state.{name}.{moment}"]
            if is_partitioned(parameter):
                # Of a whole one, DeepSpeed cannot take parts that are padded.
                part = torch.empty_like(safe_get_local_optimizer_state(parameter, moment))
                scatter(value, part)
                safe_set_local_optimizer_state(parameter, part, moment)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)
    for flat in _flat_groups(optimizer):
        optimizer.optimizer.state[flat]["step"].copy_(state[f"state.{name}.step"][0])


def _flat_groups(optimizer: object) -> list[Tensor]:
    """What the optimizer inside trains: the processes' parts of all parameters, one behind another."""
    partitioned = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    return optimizer.single_partition_of_fp32_groups if partitioned is None else partitioned
