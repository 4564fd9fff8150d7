"""Samples of images, each a function of (seed, epoch, index), and batches of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from accelerate.utils import gather_object
from PIL import Image
from torch.utils.data import Dataset, default_collate

from ...run_record import publishable
from ..randomness import Draw, generator_for
from .images import ImageTransform, UnreadableImageError
from .training_images import TrainingImages


logger = logging.getLogger(__name__)

ON_UNREADABLE = ("error", "skip")


class ImageDataset(Dataset):
    """Images as tensors. A sample depends on (seed, epoch, index) alone.

    Args:
        images: Images and labels.
        transform: How an image becomes a tensor.
        seed: Seed of the run, >= 0.
        on_unreadable: What to do about an image that cannot be read. "error" raises. "skip" puts the next readable row
            in its place, its label too, so that batches keep their size; the sample names the rows passed over.

    Raises:
        ValueError: For an unknown `on_unreadable`.
    """

    def __init__(self, images: TrainingImages, transform: ImageTransform, *, seed: int, on_unreadable: str = "error"):
        if on_unreadable not in ON_UNREADABLE:
            raise ValueError(f"`on_unreadable` must be one of {', '.join(ON_UNREADABLE)}, got {on_unreadable!r}.")
        self.images = images
        self.transform = transform
        self.seed = seed
        self.on_unreadable = on_unreadable

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        """The sample of an (epoch, index), as [`~diffusers_dtr.training.data.batches.TrainingBatches`] yields them.

        Returns:
            `pixel_values` `(channels, resolution, resolution)` in [-1, 1]; `labels`, if there are any; `epoch` and
            `index`; `row`, the one that was read; `unreadable`, the names of the rows that were passed over for it;
            what [`~diffusers_dtr.training.data.images.ImageTransform.micro_conditions`] tells.

        Raises:
            UnreadableImageError: If the image cannot be read and is not to be skipped, or if none can be read.
        """
        epoch, index = item
        image, row, unreadable = self._read(index)
        augmentation = self.transform.draw(generator_for(Draw.AUGMENTATION, self.seed, epoch, index))
        sample = {"pixel_values": self.transform(image, augmentation), "epoch": epoch, "index": index, "row": row}
        sample |= self.transform.micro_conditions(image.size, augmentation)
        if self.images.labels is not None:
            sample["labels"] = int(self.images.labels[row])
        return sample | {"unreadable": unreadable}

    def _read(self, index: int) -> tuple[Image.Image, int, list[str]]:
        unreadable = []
        for row in chain(range(index, len(self)), range(index)):
            try:
                return self.images.read(row), row, unreadable
            except UnreadableImageError:
                if self.on_unreadable == "error":
                    raise
                unreadable.append(self.images.name(row))
        raise UnreadableImageError(f"None of the {len(self)} images can be read, such as {unreadable[0]}.")


def collate_samples(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Makes a batch of samples of [`ImageDataset`] or [`~diffusers_dtr.training.data.latent_cache.LatentDataset`].

    Returns:
        What the samples hold, stacked along a first dimension: `labels`, `epoch`, `index` and `row` as int64
        `(batch,)`, strings as a list; and `unreadable`, the names of all images that were passed over for this batch,
        for a training loop to count and to log once each.
    """
    unreadable = [name for sample in samples for name in sample["unreadable"]]
    tensors = [{key: value for key, value in sample.items() if key != "unreadable"} for sample in samples]
    return default_collate(tensors) | {"unreadable": unreadable}


class UnreadableImages:
    """Counts the images that were passed over because they could not be read, and logs each once.

    Args:
        names: Those of the run before it was resumed.
    """

    def __init__(self, names: Iterable[str] = ()):
        self.names: set[str] = set(names)

    def update(self, names: list[str]) -> None:
        """Take in a batch's `unreadable`."""
        for name in names:
            # As a checkpoint tells it, where the same image must not count twice
            public = publishable(name)
            if public not in self.names:
                self.names.add(public)
                logger.warning("Cannot read %s; another image takes its place (%d so far).", name, len(self.names))

    def gather(self) -> list[str]:
        """The names that all processes have seen, as they may be published, sorted; all of them must call this."""
        return sorted(set(gather_object(sorted(self.names))))
