"""Captions of images: which of them a sample gets, and whether it gets none, are functions of its place in the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset

from ..randomness import Draw, generator_for


_ROWS_AT_ONCE = 10_000


class Captions:
    """The captions of a dataset, one or several per row, read as they are needed; one may be empty."""

    def __init__(self, dataset: datasets.Dataset, column: str):
        check_caption_feature(dataset.features, column)
        self.column = column
        self.rows = dataset.select_columns([column]).with_format(None)
        for row, captions in enumerate(chain.from_iterable(self._batches())):
            if not captions or None in captions:
                raise ValueError(
                    f"`caption_column` must have a caption in every row, got {captions or 'none'} in row {row} of "
                    f"{column!r}. Caption the image, or leave it out."
                )

    def select(self, rows: Sequence[int]) -> Captions:
        """Those of some rows, in their order."""
        return Captions(self.rows.select(rows), self.column)

    def __getitem__(self, row: int) -> list[str]:
        """The captions of a row."""
        return as_list(self.rows[row][self.column])

    def all(self) -> Iterator[str]:
        """The captions of all rows, read a few at a time."""
        return chain.from_iterable(chain.from_iterable(self._batches()))

    def fingerprint(self) -> str:
        """A hash of the captions of all rows, in their order."""
        digest = hashlib.sha256()
        for rows in self._batches():
            digest.update(json.dumps(rows).encode())
        return digest.hexdigest()[:16]

    def _batches(self) -> Iterator[list[list[str]]]:
        for rows in self.rows.iter(_ROWS_AT_ONCE):
            yield [*map(as_list, rows[self.column])]


def check_caption_feature(features: datasets.Features, column: str) -> None:
    """Refuse a column that holds no captions."""
    feature = features[column]
    value = getattr(feature, "feature", feature)  # what a list is a list of
    if not isinstance(value, datasets.Value) or "string" not in value.dtype:
        raise ValueError(
            f"`caption_column` must hold strings or lists of strings, got {column!r}, which holds {feature}. "
            "Choose another with `--caption_column`."
        )


def as_list(captions: str | list[str] | None) -> list[str]:
    """The captions of a row, which may be one."""
    return [captions] if isinstance(captions, str) else captions or []


@dataclass(eq=False)
class CaptionedDataset(Dataset):
    """Adds a `caption` to the samples of a dataset of images or latents.

    Args:
        dataset: Its samples are of (epoch, index).
        captions: Of its rows.
        seed: Seed of the run, >= 0: one of a row's captions is drawn, depending on (seed, epoch, index) alone. None
            gives every row its first caption.
        proportion_empty: Share of samples whose caption is replaced by an empty one, in [0, 1], drawn likewise.
    """

    dataset: Dataset
    captions: Captions
    seed: int | None = None
    proportion_empty: float = 0.0

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def images(self) -> Any:
        """What the dataset has samples of."""
        return self.dataset.images

    @property
    def buckets(self) -> Any:
        """The buckets of its images, if any."""
        return self.dataset.buckets

    def __getitem__(self, item: tuple) -> dict[str, Any]:
        """The sample of an (epoch, index), or of an (epoch, index, row) of a stream, with its `caption`."""
        captions = self.captions[item[-1]]
        caption = captions[0]
        if self.seed is not None:
            generator = generator_for(Draw.CAPTION, self.seed, *item[:2])
            # In float32 the product could round up to the number of captions.
            drop, choice = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            caption = "" if drop < self.proportion_empty else captions[int(choice * len(captions))]
        return self.dataset[item] | {"caption": caption}
