"""The number types that things are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def scalar_dtype(device: torch.device) -> torch.dtype:
    """The widest float type of a device, for what there is one of per timestep, sample or cluster."""
    return torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no float64


def sample_dtype(sample: Tensor) -> torch.dtype:
    """The type that a sample is computed in: float32 at least, because half precision rounds sums and squares away."""
    return torch.promote_types(sample.dtype, torch.float32)
