"""The order of the data as a pure function of a seed and a position.

Nothing here has a state that would have to be saved: a run that resumes at a step sees what the uninterrupted run saw,
to the bit, with any number of workers and processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from torch.utils.data import Sampler

from ..randomness import Draw, generator_for


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """Endless batches of (epoch, index), for `DataLoader(dataset, batch_sampler=...)`.

    The data is one stream: epoch after epoch, each in an order of its own. A global batch is the next `batch_size *
    num_processes` samples of it, and process p takes the p-th part. So nothing is dropped or padded, a batch may span
    epochs, and the stream does not depend on how many processes share a global batch.

    The sampler splits batches between processes itself: do not pass its data loader to `Accelerator.prepare`, which
    would split them once more.

    Args:
        num_samples: Size of the dataset.
        batch_size: Samples per batch of one process.
        seed: Seed of the run, >= 0.
        num_processes: Number of processes that train together.
        process_index: Which of them this is, in [0, num_processes).
        start_step: The step whose batch comes first, counted in batches of one process: with gradient accumulation,
            optimiser steps times accumulation steps.

    Raises:
        ValueError: For an argument that is out of range.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        num_processes: int = 1,
        process_index: int = 0,
        start_step: int = 0,
    ):
        for name, value, least in (
            ("num_samples", num_samples, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("num_processes", num_processes, 1),
            ("start_step", start_step, 0),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"`process_index` must be in [0, {num_processes}), got {process_index}.")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index
        self.start_step = start_step
        self._latest_order: tuple[int, np.ndarray] | None = None

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Batches from `start_step` on, without end."""
        return map(self.batch, count(self.start_step))

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The (epoch, index) of each sample of this process's batch at a step."""
        first = (step * self.num_processes + self.process_index) * self.batch_size
        epochs, places = np.divmod(np.arange(first, first + self.batch_size), self.num_samples)
        indices = np.empty_like(places)
        for epoch in range(epochs[0], epochs[-1] + 1):
            indices[epochs == epoch] = self._order(epoch)[places[epochs == epoch]]
        return list(zip(epochs.tolist(), indices.tolist(), strict=True))

    def _order(self, epoch: int) -> np.ndarray:
        if self._latest_order is None or self._latest_order[0] != epoch:
            generator = generator_for(Draw.ORDER, self.seed, epoch, 0)
            self._latest_order = epoch, torch.randperm(self.num_samples, generator=generator).numpy()
        return self._latest_order[1]
