"""Samples of images or videos and their order, as pure functions of a seed and a position.

Nothing here has a state that would have to be saved: a run that resumes at a step sees what the uninterrupted run saw,
to the bit, with any number of workers and processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, Sampler

from ..randomness import Draw, generator_for
from .images import Augmentation, ImageTransform
from .training_images import TrainingImages
from .videos import TrainingVideos


if TYPE_CHECKING:
    from .buckets import AspectRatioBuckets


@dataclass(eq=False)
class ImageDataset(Dataset):
    """Images or videos as tensors. A sample depends on (seed, epoch, index) alone."""

    images: TrainingImages | TrainingVideos
    transform: ImageTransform
    _: KW_ONLY
    seed: int
    buckets: AspectRatioBuckets | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple) -> dict[str, Any]:
        """The sample of an (epoch, index), as [`TrainingBatches`] yields them, or an (epoch, index, row) of a stream.

        It has `pixel_values` in [-1, 1], `epoch`, `index`, `labels` if there are any, and what
        [`~diffusers_dtr.training.data.images.ImageTransform.micro_conditions`] tells.
        """
        (epoch, index), row = item[:2], item[-1]
        augmentation = self.transform.draw(generator_for(Draw.AUGMENTATION, self.seed, epoch, index))
        values, size = self._read(epoch, row, augmentation)
        sample = values | {"epoch": epoch, "index": index} | self._transform(row).micro_conditions(size, augmentation)
        return sample if self.images.labels is None else sample | {"labels": self.images.label(row)}

    def _read(self, epoch: int, row: Any, augmentation: Augmentation) -> tuple[dict[str, Any], tuple[int, int]]:
        """The values of a sample, and the width and height that its image had."""
        image = self.images.read(row)
        return {"pixel_values": self._transform(row)(image, augmentation)}, image.size

    def _transform(self, row: Any) -> ImageTransform:
        if self.buckets is None:
            return self.transform
        return replace(self.transform, resolution=self.buckets.size(row))


@dataclass(eq=False)
class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """Endless batches of (epoch, index), for `DataLoader(dataset, batch_sampler=...)`.

    The data is one stream: epoch after epoch, each in an order of its own. A global batch is the next `batch_size *
    num_processes` samples of it, and process p takes the p-th part. So nothing is dropped or padded, a batch may span
    epochs, and the stream does not depend on how many processes share a global batch. `start_step` counts batches of
    one process: with gradient accumulation, optimizer steps times accumulation steps. `Accelerator.prepare` must not
    get the data loader, because it would split batches between processes once more.
    """

    num_samples: int
    batch_size: int
    _: KW_ONLY
    seed: int
    num_processes: int = 1
    process_index: int = 0
    start_step: int = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Batches from `start_step` on, without end."""
        return map(self.batch, count(self.start_step))

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The (epoch, index) of each sample of this process's batch at a step."""
        first = (step * self.num_processes + self.process_index) * self.batch_size
        places = [divmod(place, self.num_samples) for place in range(first, first + self.batch_size)]
        return [(epoch, int(_order(self.num_samples, self.seed, epoch)[place])) for epoch, place in places]


def epoch_order(num_samples: int, seed: int, epoch: int, stream: int = 0) -> torch.Tensor:
    """The order of samples in an epoch, `(num_samples,)`, of one stream of them or of several."""
    return torch.randperm(num_samples, generator=generator_for(Draw.ORDER, seed, epoch, stream))


_order = lru_cache(maxsize=2)(epoch_order)
