"""Every random draw of a training run as a pure function of its seed and its place in the run.

Nothing random is saved or restored, and a resumed run is the unbroken one. The place of a sample is its epoch and
index; that of a step is its number. The place of what a model draws is the number of a micro-batch, what one process
feeds through it in one forward call, counted over the whole run and all processes: a step of two processes draws what
one process draws that accumulates the gradients of two forward calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch


class Draw(IntEnum):
    """What is drawn, and at which place. Draws of one seed and place are independent."""

    # Spelt out, because small numbers would hash like others: (seed, epoch, index, 0) equals (seed, epoch, index).
    ORDER = int.from_bytes(b"order", "big")  # epoch, stream
    SUBSET = int.from_bytes(b"subset", "big")  # 0, 0
    AUGMENTATION = int.from_bytes(b"augmentation", "big")  # epoch, index
    POSTERIOR = int.from_bytes(b"posterior", "big")  # epoch, index
    CAPTION = int.from_bytes(b"caption", "big")  # epoch, index
    TIMESTEPS = int.from_bytes(b"timesteps", "big")  # step, of which each micro-batch takes its part
    NOISE = int.from_bytes(b"noise", "big")  # micro-batch
    MODEL = int.from_bytes(b"model", "big")  # micro-batch


def derive_seed(*entropy: int) -> int:
    """A seed in [0, 2**63) from non-negative integers, such as (seed, step), independent of its neighbours'."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def generator_for(draw: Draw, seed: int, *place: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on its arguments alone; `place` is as at [`Draw`]."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *place, draw))


def posterior_generators(seed: int, epochs: Iterable[int], indices: Iterable[int]) -> list[torch.Generator]:
    """The generators of a batch's latents, from its epochs and indices on the CPU."""
    pairs = zip(epochs, indices, strict=True)
    return [generator_for(Draw.POSTERIOR, seed, int(epoch), int(index)) for epoch, index in pairs]


def seed_model(seed: int, micro_batch: int) -> None:
    """Seed the global generators, from which a model draws in training mode: label drops, dropout."""
    torch.manual_seed(derive_seed(seed, micro_batch, Draw.MODEL))
