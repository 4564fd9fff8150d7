"""Tables of values by timestep, and the devices, number types and shapes for computing with samples."""

from __future__ import annotations

import torch
from torch import Tensor


def scalar_dtype(device: torch.device) -> torch.dtype:
    """The widest float type of a device, for scalars per timestep, sample or cluster."""
    return torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no float64


def sample_dtype(sample: Tensor) -> torch.dtype:
    """The type to compute a sample in: float32 at least, because half precision rounds sums and squares away."""
    return torch.promote_types(sample.dtype, torch.float32)


class TimestepTable:
    """Float64 values at the timesteps 0 to T − 1, interpolated between them, copied to each device once."""

    def __init__(self, values: Tensor):
        self._values = values.to("cpu", torch.float64)
        self._copies: dict[torch.device, Tensor] = {}

    def __call__(self, timesteps: Tensor) -> Tensor:
        """Values `(B,)` at timesteps `(B,)` in [0, T - 1], on their device."""
        if timesteps.device not in self._copies:
            self._copies[timesteps.device] = self._values.to(timesteps.device, scalar_dtype(timesteps.device))
        values = self._copies[timesteps.device]
        lower = timesteps.floor().long()
        below, above = values.index_select(0, lower), values.index_select(0, timesteps.ceil().long())
        return torch.lerp(below, above, (timesteps - lower).to(values.dtype))


def is_discrete(grid: Tensor) -> bool:
    """Whether a training grid is 0, 1, ..., T − 1, and denoisers are called with integers. Flow has 1 to T."""
    return torch.equal(grid, torch.arange(len(grid), dtype=grid.dtype, device=grid.device))


def per_sample(values: Tensor, sample: Tensor) -> Tensor:
    """Reshape scalars `(B,)` to broadcast over `sample` `(B, ...)`, on its device and in at least float32."""
    return values.to(sample.device, sample_dtype(sample)).view(-1, *[1] * (sample.ndim - 1))
