"""Mask tables in checkpoints of DTR's code, and the routing settings that produce them.

Every block's router keeps its masks of all timesteps as a float32 buffer `(timesteps, channels)`: 129 MB in DiT-XL. In
ours they follow from three numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..routing import routing_mask


MASK_BUFFER = "routing._unit_mapping"

# The only value in the released code, assumed where the masks fit any.
_RELEASED_ALPHA = 4.0
_ROUNDING = 1e-12


def mask_table(num_timesteps: int, num_channels: int, alpha: float, beta: float) -> torch.Tensor:
    """The masks of all timesteps as DTR's code saves them: float32 `(num_timesteps, num_channels)`, 1 is active."""
    limits = (0, num_timesteps - 1)
    return routing_mask(
        torch.arange(num_timesteps), num_channels, alpha=alpha, beta=beta, timestep_range=limits
    ).float()


def read_mask_tables(tables: Iterable[torch.Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Infer the routing config of a checkpoint from its blocks' masks; `given` values must give the same masks."""
    first, *others = tables
    if any(not torch.equal(first, other) for other in others):
        raise ValueError(
            "The masks of the checkpoint differ between blocks, as those of random routing do; "
            "only one sliding window for all blocks can be converted."
        )
    # A tie puts the exponent at the very end of its interval, which belongs to it if the half is rounded this way.
    guesses = (_infer_routing(first, margin) for margin in (_ROUNDING, -_ROUNDING))
    found = next((guess for guess in guesses if guess is not None and _gives(first, guess)), None)
    if found is None:
        raise ValueError(
            f"The masks of the checkpoint, of shape {tuple(first.shape)}, are not those of a window that slides over "
            "the timesteps, so they cannot be converted."
        )
    routing = {**found, **{name: given[name] for name in found if given.get(name) is not None}}
    if not _gives(first, routing):
        differing = {name: given[name] for name, value in found.items() if given.get(name, value) != value}
        raise ValueError(f"The routing must be that of the checkpoint's masks, {found}, got {differing}.")
    return routing


def _infer_routing(table: torch.Tensor, margin: float) -> dict[str, Any] | None:
    if table.ndim != 2 or table.shape[0] < 2 or table.shape[1] < 1 or not table[0].any():
        return None
    num_timesteps, num_channels = table.shape
    num_active = int(table[0].count_nonzero())
    below_next = math.nextafter((num_active + 1) / num_channels, 0)
    return {
        "routing_type": "dtr",
        "routing_alpha": _alpha(table.argmax(dim=1), num_channels - num_active, margin),
        "routing_beta": _shortest_decimal(num_active / num_channels, below_next),
        "routing_timestep_range": (0, num_timesteps - 1),
    }


def _gives(table: torch.Tensor, routing: Mapping[str, Any]) -> bool:
    if routing["routing_type"] != "dtr" or tuple(routing["routing_timestep_range"]) != (0, table.shape[0] - 1):
        return False
    return torch.equal(table.float(), mask_table(*table.shape, routing["routing_alpha"], routing["routing_beta"]))


def _alpha(starts: torch.Tensor, last_start: int, margin: float) -> float:
    """The exponent of s = round(L τ^α), from |L τ^α - s| <= 1/2 at every timestep, in an interval that much wider."""
    if last_start == 0:
        return _RELEASED_ALPHA
    starts = starts[1:-1].double()
    log_position = torch.log(torch.linspace(0, 1, len(starts) + 2, dtype=torch.float64)[1:-1])
    # log τ is negative, so the upper end of s bounds α from below; beyond [0, L] there is no bound.
    at_least = torch.log(((starts + 0.5) / last_start).clamp(max=1)) / log_position
    at_most = torch.log(((starts - 0.5) / last_start).clamp(min=0)) / log_position
    low = max([0.0, *at_least.tolist()]) - margin
    high = min([math.inf, *at_most.tolist()]) + margin
    return _RELEASED_ALPHA if low <= _RELEASED_ALPHA <= high or low > high else _shortest_decimal(low, high)


def _shortest_decimal(low: float, high: float) -> float:
    """The number above 0 and in [low, high] with the fewest digits after the point."""
    for digits in range(17):
        number = round(max(math.ceil(low * 10**digits), 1) / 10**digits, digits)
        if low <= number <= high:
            return number
    return low
