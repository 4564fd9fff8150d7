"""The timesteps that a forward call is made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def argument(name: str, position: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call gives the argument of a name and a position, counted from 0, or None."""
    if name in kwargs:
        return kwargs[name]
    return args[position] if position < len(args) else None


def timestep_batch(
    timestep: torch.Tensor | float | None,
    sample: torch.Tensor | Sequence[torch.Tensor],
    *,
    per_token: bool = False,
    one_for_all: bool = False,
) -> torch.Tensor:
    """The timesteps of a forward call, `(batch,)` or one per frame or token `(batch, n)`, on the sample's device.

    Args:
        timestep: Scalar, `(batch,)`, or `(batch, ...)` with n per sample; a ValueError for another shape, or None.
        sample: `(batch, ...)`, or a list with a tensor for each sample.
        per_token: Whether `(batch, n)` is allowed.
        one_for_all: Whether a single one for all samples stays `(1,)`.
    """
    if timestep is None:  # as it is by default in some of diffusers' models
        raise ValueError("`timestep` must be given: the conditioning and the routing depend on it.")
    batch, device = len(sample), _device(sample)
    if not torch.is_tensor(timestep):
        timestep = torch.tensor(timestep, device=device)
    timestep = timestep.to(device)
    if per_token and timestep.ndim > 1 and timestep.shape[0] == batch:
        timestep = timestep.reshape(batch, -1)
        return timestep if timestep.shape[1] > 1 else timestep[:, 0]
    if timestep.ndim > 1 or timestep.numel() not in (1, batch):
        raise ValueError(
            f"`timestep` must be a scalar or of shape (batch,){' or (batch, n)' if per_token else ''} with batch = "
            f"{batch}, got {tuple(timestep.shape)}."
        )
    return timestep.reshape(-1) if one_for_all else timestep.reshape(-1).expand(batch)


def _device(sample: torch.Tensor | Sequence) -> torch.device:
    return sample.device if torch.is_tensor(sample) else _device(sample[0])
