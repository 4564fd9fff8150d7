"""Values by timestep, and how they meet samples: devices, dtypes and shapes."""

from __future__ import annotations

import torch
from torch import Tensor


class TimestepTable:
    """Float64 values at the timesteps 0 to T − 1, interpolated between them, copied to each device once."""

    def __init__(self, values: Tensor):
        self._values = values.to("cpu", torch.float64)
        self._copies: dict[torch.device, Tensor] = {}

    def __call__(self, timesteps: Tensor) -> Tensor:
        """Values `(B,)` at timesteps `(B,)`, on their device."""
        if timesteps.device not in self._copies:
            self._copies[timesteps.device] = self._values.to(timesteps.device, scalar_dtype(timesteps))
        values = self._copies[timesteps.device]
        lower = timesteps.floor().long()
        try:
            below, above = values.index_select(0, lower), values.index_select(0, timesteps.ceil().long())
        except IndexError as error:  # a GPU reports the same as a device-side assertion: checking would wait for it
            raise ValueError(
                f"`timesteps` must lie in [0, {len(values) - 1}], got {timesteps.min()} to {timesteps.max()}."
            ) from error
        return torch.lerp(below, above, (timesteps - lower).to(values.dtype))


def scalar_dtype(timesteps: Tensor) -> torch.dtype:
    """The widest float type of the timesteps' device."""
    return torch.float32 if timesteps.device.type == "mps" else torch.float64  # Apple GPUs have no float64


def wide(sample: Tensor) -> torch.dtype:
    """The type that a sample is computed in: float32 at least."""
    return torch.promote_types(sample.dtype, torch.float32)


def per_sample(values: Tensor, sample: Tensor) -> Tensor:
    """Scalars `(B,)` made to broadcast over `sample` `(B, ...)`, on its device and in at least float32."""
    return values.to(sample.device, wide(sample)).view(-1, *[1] * (sample.ndim - 1))
