"""Every random draw of a training run as a pure function of its seed and its place in the run.

Nothing random is saved or restored, and a resumed run is the unbroken one. The place is the number of a micro-batch,
what one process feeds through the model in one forward call, counted over the whole run and all processes. So a step
of two processes draws what one process draws that accumulates the gradients of two forward calls.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class _Stream(IntEnum):
    """What is drawn. Streams of one seed and place are independent, and so are those of single samples (`Draw`)."""

    NOISE = int.from_bytes(b"noise", "big")
    TIMESTEPS = int.from_bytes(b"timesteps", "big")
    MODEL = int.from_bytes(b"model", "big")


def derive_seed(*entropy: int) -> int:
    """A seed from several numbers, such as (seed, step, process), that shares nothing with their neighbours' seeds.

    Args:
        *entropy: Non-negative integers.

    Returns:
        An integer in [0, 2**63).
    """
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def noise_generator(seed: int, micro_batch: int, device: torch.device | str) -> torch.Generator:
    """The generator of a micro-batch's noise.

    Args:
        seed: The run's seed.
        micro_batch: Its number.
        device: Where the noise is drawn.
    """
    return torch.Generator(device).manual_seed(derive_seed(seed, micro_batch, _Stream.NOISE))


def timestep_generator(seed: int, step: int) -> torch.Generator:
    """The CPU generator of the timesteps of an optimizer step, of which each micro-batch takes its part.

    Args:
        seed: The run's seed.
        step: Optimizer steps done.
    """
    return torch.Generator().manual_seed(derive_seed(seed, step, _Stream.TIMESTEPS))


def seed_model(seed: int, micro_batch: int) -> None:
    """Seed the global generators, from which a model draws in training mode: label drops, dropout.

    Args:
        seed: The run's seed.
        micro_batch: The number of the micro-batch that is about to go through the model.
    """
    torch.manual_seed(derive_seed(seed, micro_batch, _Stream.MODEL))
