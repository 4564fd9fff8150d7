"""Samples of images or videos and their order, as pure functions of a seed and a position.

Nothing here has a state that would have to be saved: a run that resumes at a step sees what the uninterrupted run saw,
to the bit, with any number of workers and processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..randomness import Draw, generator_for
from .images import ImageTransform
from .training_images import TrainingImages
from .videos import TrainingVideos, VideoTransform


class ImageDataset(Dataset):
    """Images or videos as tensors. A sample depends on (seed, epoch, index) alone."""

    def __init__(
        self, images: TrainingImages | TrainingVideos, transform: ImageTransform | VideoTransform, *, seed: int
    ):
        self.images = images
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        """The sample of an (epoch, index), as [`TrainingBatches`] yields them.

        It has `pixel_values` in [-1, 1], `epoch`, `index`, `labels` if there are any, and what
        [`~diffusers_dtr.training.data.images.ImageTransform.micro_conditions`] tells.
        """
        epoch, index = item
        image = self.images.read(index)
        augmentation = self.transform.draw(generator_for(Draw.AUGMENTATION, self.seed, epoch, index))
        sample = {"pixel_values": self.transform(image, augmentation), "epoch": epoch, "index": index}
        if self.images.labels is not None:
            sample["labels"] = int(self.images.labels[index])
        return sample | self.transform.micro_conditions(image.size, augmentation)


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """Endless batches of (epoch, index), for `DataLoader(dataset, batch_sampler=...)`.

    The data is one stream: epoch after epoch, each in an order of its own. A global batch is the next `batch_size *
    num_processes` samples of it, and process p takes the p-th part. So nothing is dropped or padded, a batch may span
    epochs, and the stream does not depend on how many processes share a global batch. `start_step` counts batches of
    one process: with gradient accumulation, optimizer steps times accumulation steps.

    The sampler splits batches between processes itself: do not pass its data loader to `Accelerator.prepare`, which
    would split them once more.
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
