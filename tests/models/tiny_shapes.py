"""What the tiny denoisers' inputs are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TinyDenoiser:
    """One class of diffusers: `class(**config)` takes `inputs(batch, generator)`."""

    config: dict
    inputs: Callable[[int, torch.Generator], dict]


def noise(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def between(generator: torch.Generator, shape: int | tuple[int, ...], low: float, high: float) -> torch.Tensor:
    """Timesteps: real numbers in [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def lengths_differ(batch: int, tokens: int) -> torch.Tensor:
    """A mask of captions `(batch, tokens)` of which every second one is two tokens shorter."""
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[1::2, -2:] = False
    return mask


def positions(*sizes: int) -> torch.Tensor:
    """Coordinates `(product of sizes, axes)` on a grid, last axis fastest."""
    grid = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in sizes), indexing="ij")
    return torch.stack(grid, dim=-1).flatten(0, -2)
