"""Aspect-ratio buckets: the few sizes to which images are resized and cropped, and steps whose images are of one."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from datasets.utils import tqdm
from diffusers import ModelMixin
from torch.utils.data import DataLoader

from ...caches import build_folder, content_key
from ...latents import vae_scale_factor
from ..components import check_positions
from ..config import TrainingConfig
from .samples import TrainingBatches, epoch_order
from .training_images import TrainingImages


if TYPE_CHECKING:
    from ..families.base import DenoiserFamily


logger = logging.getLogger(__name__)

# Of `auto`, long side to short: those of prints, photographs and screens.
_RATIOS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2)
_SIZES = "sizes.npy"
# How many times the pixels of a square of `--resolution` a size may have; typing errors have thousands.
_MOST_AREA = 4


def resolve_buckets(
    config: TrainingConfig, family: DenoiserFamily, vae: ModelMixin, model_config: Mapping[str, Any]
) -> TrainingConfig:
    """The run's configuration with the sizes of its buckets, if it has any; a `ValueError` if they do not fit."""
    if getattr(config.data, "aspect_ratio_buckets", None) is None:
        return config
    multiple, flag = family.side_multiple(model_config, vae), "aspect_ratio_buckets"
    sizes = config.data.bucket_sizes or auto_sizes(config.data.resolution, multiple)
    for height, width in sizes:
        if height % multiple or width % multiple:
            raise ValueError(f"`--{flag}` must be of multiples of {multiple}, got {height},{width}.")
        token = vae_scale_factor(vae) * family.token_side(model_config)
        check_positions(flag, max(height, width), token, model_config)
        if height * width > _MOST_AREA * config.data.resolution**2:
            raise ValueError(
                f"`--{flag}` must have at most {_MOST_AREA} times the pixels of `--resolution` "
                f"{config.data.resolution}, got {height},{width}."
            )
    return config.replace(**{flag: ";".join(f"{height},{width}" for height, width in sorted(sizes))})


def auto_sizes(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """Heights and widths, multiples of so many pixels, of about as many pixels as a square, up to 2:1 and 1:2.

    Where a multiple is much of a side, ratios are rounded, up to 3:1, and those that become the same are one.
    """
    sizes = {}  # by ratio, of which rounding may leave fewer
    for ratio in _RATIOS:
        long = max(1, round(resolution * ratio**0.5 / multiple)) * multiple
        short = max(1, round(resolution**2 / long / multiple)) * multiple
        sizes |= {Fraction(long, short): (long, short), Fraction(short, long): (short, long)}
    return [*sizes.values()]


@dataclass(frozen=True, eq=False)
class AspectRatioBuckets:
    """Which size the images of a dataset have, by row.

    Attributes:
        sizes: Heights and widths.
        numbers: Which of them a row has, `(rows,)`.
    """

    sizes: Sequence[tuple[int, int]]
    numbers: np.ndarray

    @classmethod
    def nearest(cls, sizes: Sequence[tuple[int, int]], image_sizes: np.ndarray) -> AspectRatioBuckets:
        """Those whose ratio of sides is nearest to that of images of these widths and heights, `(rows, 2)`."""
        sizes = sorted(sizes, key=lambda size: size[0] / size[1])
        ratios = np.log([height / width for height, width in sizes])
        middles = (ratios[1:] + ratios[:-1]) / 2
        buckets = cls(sizes, np.searchsorted(middles, np.log(image_sizes[:, 1] / image_sizes[:, 0])))
        for (height, width), rows in zip(sizes, buckets.rows, strict=True):
            logger.info(f"Bucket {height},{width}: {len(rows)} images.")
        return buckets

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of a row's image."""
        return self.sizes[self.numbers[row]]

    @cached_property
    def rows(self) -> list[np.ndarray]:
        """The rows of every bucket, in ascending order."""
        return [np.flatnonzero(self.numbers == number) for number in range(len(self.sizes))]

    def place(self, row: int) -> int:
        """Where a row is if the rows of one bucket come after those of another."""
        return int(self._places[row])

    @cached_property
    def _places(self) -> np.ndarray:
        return np.concatenate(self.rows).argsort()


def read_sizes(images: TrainingImages, cache_dir: str | None = None, num_workers: int = 0) -> np.ndarray:
    """Widths and heights of all images, `(rows, 2)`, from their headers, which are read once for a dataset.

    With several processes, let the main one go first.
    """
    key = content_key({"dataset": images.dataset._fingerprint, "image_column": images.image_column}, [])
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).absolute() / "image_sizes" / key

    def write(place: Path) -> None:
        options = {"num_workers": num_workers, "generator": torch.Generator()}
        loader = DataLoader(range(len(images)), 256, collate_fn=partial(_sizes, images), **options)
        np.save(place / _SIZES, np.concatenate([*tqdm(loader, "Reading the sizes of images", unit="batch")]))

    build_folder(folder, write)
    return np.load(folder / _SIZES)


def _sizes(images: TrainingImages, rows: list[int]) -> np.ndarray:
    return np.array([images.size(row) for row in rows])


@dataclass(eq=False)
class BucketedBatches(TrainingBatches):
    """As [`TrainingBatches`], but all images of an optimizer step, `micro_batches` batches, are of one bucket.

    Every bucket is a stream of its own, epoch after epoch, and its steps are spread evenly over an epoch of all
    images. What does not fill a step at the end of an epoch is carried over to the next: nothing is dropped or padded,
    and no image comes again before all others of its bucket. The stream depends on neither the number of processes nor
    that of accumulated batches, but on their product, and is that of `TrainingBatches` if there is one bucket.
    """

    _: KW_ONLY
    buckets: AspectRatioBuckets
    micro_batches: int

    def __post_init__(self):
        self._size = self.batch_size * self.micro_batches
        self._rows = [rows for rows in self.buckets.rows if len(rows)]
        self._order = lru_cache(maxsize=2 * len(self._rows))(epoch_order)
        self._steps = lru_cache(maxsize=1)(self._steps_of)
        for rows in self._rows:
            if len(rows) < self._size:
                height, width = self.buckets.size(rows[0])
                logger.warning(
                    f"Bucket {height},{width} has {len(rows)} images, fewer than the {self._size} of a step, which "
                    f"has them {self._size / len(rows):.1f} times, so that it comes that seldom."
                )

    def batch(self, step: int) -> list[tuple[int, int]]:
        """As [`TrainingBatches.batch`]."""
        step, part = divmod(step * self.num_processes + self.process_index, self.micro_batches)
        # Every bucket lacks less than a step of what its share of the epochs is.
        latest = (step + len(self._rows)) * self._size // self.num_samples + 2
        epoch = bisect_right(range(latest), step, key=self._steps_before) - 1
        numbers, steps = self._steps(epoch)
        place = step - self._steps_before(epoch)
        rows, first = self._rows[numbers[place]], int(steps[place]) * self._size + part * self.batch_size
        places = [divmod(place, len(rows)) for place in range(first, first + self.batch_size)]
        # The bucket's first row tells it from others, whatever their sizes.
        orders = [(self._order(len(rows), self.seed, epoch, int(rows[0])), place) for epoch, place in places]
        return [(epoch, int(rows[order[place]])) for (epoch, _), (order, place) in zip(places, orders, strict=True)]

    def _steps_before(self, epoch: int) -> int:
        return sum(epoch * len(rows) // self._size for rows in self._rows)

    def _steps_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The steps that are completed in an epoch: the bucket of each, and its number among those of the bucket."""
        counts = [len(rows) for rows in self._rows]
        steps = [np.arange(epoch * count // self._size, (epoch + 1) * count // self._size) for count in counts]
        times = [((some + 1) * self._size - epoch * count) / count for some, count in zip(steps, counts, strict=True)]
        order = np.concatenate(times).argsort(kind="stable")
        numbers = np.repeat(np.arange(len(counts)), [len(some) for some in steps])
        return numbers[order], np.concatenate(steps)[order]
