"""Every random draw of a training run as a pure function of its seed and its place in the run.

Nothing random is saved or restored, and a resumed run is the unbroken one.
"""

from __future__ import annotations

import numpy as np
import torch


def derive_seed(*entropy: int) -> int:
    """A seed from several numbers, such as (seed, step, process), that shares nothing with their neighbours' seeds.

    Args:
        *entropy: Non-negative integers.

    Returns:
        An integer in [0, 2**63).
    """
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def step_generator(seed: int, step: int, process_index: int, device: torch.device | str) -> torch.Generator:
    """The generator of one forward call's noise and timesteps.

    Args:
        seed: The run's seed.
        step: Number of the forward call, counted over the whole run.
        process_index: The process that makes the call.
        device: Where the draws are made.

    Returns:
        A generator on `device`.
    """
    return torch.Generator(device).manual_seed(derive_seed(seed, step, process_index))


def shared_generator(seed: int, step: int) -> torch.Generator:
    """The generator, on the CPU, of what all processes draw alike in one forward call.

    Args:
        seed: The run's seed.
        step: Number of the forward call, counted over the whole run.
    """
    return torch.Generator().manual_seed(derive_seed(seed, step, 2**32))
