"""Images that are read from a stream as it goes by: of the Hub, parquet files or WebDataset tars, by 🤗 datasets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pyarrow
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import Sampler

from ..config import TrainingConfig
from .captions import as_list, check_caption_feature
from .training_images import TrainingImages, check_columns, check_label_feature, read_image, training_images


Row = dict[str, Any]


class StreamedCaptions:
    """The captions of rows that went by, one or several each."""

    def __init__(self, features: datasets.Features, column: str):
        check_caption_feature(features, column)
        self.column = column

    def __getitem__(self, row: Row) -> list[str]:
        captions = as_list(row[self.column])
        if not captions or None in captions:
            raise ValueError(f"`caption_column` must have a caption in every row, got none in {self.column!r}.")
        return captions


@dataclass(frozen=True)
class StreamedImages(TrainingImages):
    """As [`TrainingImages`], but a row is what the stream has, not a number, and nobody knows how many there are.

    The `labels` `(classes,)` are those of the classes of the stream, by what its `label_column` says.
    """

    dataset: datasets.IterableDataset
    label_column: str | None = None

    def read(self, row: Row) -> Image.Image:
        """Decodes a row's image."""
        return read_image(row[self.image_column], "of the stream")

    def label(self, row: Row) -> int:
        """The label of a row."""
        value = row[self.label_column]
        if value is None or not 0 <= value < len(self.labels):
            raise ValueError(
                f"`label_column` must hold labels in [0, {len(self.labels)}), got {value} in {self.label_column!r}: "
                "choose another, or give `--num_classes` if there are more."
            )
        return int(self.labels[value])

    def first(self, count: int) -> TrainingImages:
        """The first images of the stream, in memory."""
        rows = datasets.Dataset.from_list([*self.dataset.take(count)], self.dataset.features)
        caption_column = None if self.captions is None else self.captions.column
        return training_images(rows, self.image_column, self.label_column, caption_column)


def load_streamed_images(
    config: TrainingConfig, split: str, label_column: str | None, caption_column: str | None
) -> StreamedImages:
    """The stream of a split of a dataset on the Hub or in a folder; its columns are checked, no image is read."""
    data = config.data
    source = data.dataset_name, data.dataset_config_name
    stream = datasets.load_dataset(*source, split=split, streaming=True, cache_dir=config.model.cache_dir)
    if stream.features is None:
        raise ValueError(f"`--dataset_name` must say what its columns hold to be streamed, got {data.dataset_name!r}.")
    columns = {"image_column": data.image_column, "caption_column": caption_column, "label_column": label_column}
    check_columns(stream.features, columns)
    stream = stream.select_columns([column for column in columns.values() if column is not None])
    # Undecoded, as workers decode, and so that a file that cannot be decoded can be named
    stream = stream.cast_column(data.image_column, datasets.Image(decode=False))
    captions = None if caption_column is None else StreamedCaptions(stream.features, caption_column)
    if label_column is None:
        return StreamedImages(stream, data.image_column, captions=captions)
    names = check_label_feature(stream.features, label_column)
    num_classes = data.num_classes if names is None else len(names)
    if num_classes is None or data.num_classes not in (None, num_classes):
        has = "does not say how many classes there are" if names is None else f"has {num_classes} classes"
        raise ValueError(f"`--num_classes` must be that of the data, got {data.num_classes}: {label_column!r} {has}.")
    id2label = None if names is None else dict(enumerate(names))
    labels = np.arange(num_classes)
    return StreamedImages(stream, data.image_column, labels, num_classes, id2label, captions, label_column)


@dataclass(eq=False)
class StreamedBatches(Sampler[list[tuple[int, int, Row]]]):
    """Endless batches of (epoch, index, row) of a stream, as [`TrainingBatches`] has them of places.

    Processes share the files of the stream if their number divides that of the files, else each takes every
    `num_processes`-th row. Files and rows are shuffled with (seed, epoch), rows by a buffer of `buffer_size`; 1 leaves
    both as they lie. The main process reads rows, and workers decode them, so that their number changes nothing.
    `start_step` is as at [`TrainingBatches`], and `state` what [`state_at`] said then; a loader may be so many batches
    `ahead` of training.
    """

    rows: datasets.IterableDataset
    batch_size: int
    _: KW_ONLY
    seed: int
    buffer_size: int
    num_processes: int = 1
    process_index: int = 0
    start_step: int = 0
    ahead: int = 0
    state: dict[str, Any] | None = None
    _states: dict[int, dict[str, Any]] = field(default_factory=dict, init=False)

    def __post_init__(self):
        if self.buffer_size > 1:
            self.rows = self.rows.shuffle(self.seed, buffer_size=self.buffer_size)
        self.rows = split_dataset_by_node(self.rows, self.process_index, self.num_processes)
        self.state = self.state or {"epoch": 0, "place": 0, "rows": None}
        self._states[self.start_step] = self.state
        if self.state["rows"] is not None:
            self.rows.load_state_dict(self.state["rows"])

    def __iter__(self) -> Iterator[list[tuple[int, int, Row]]]:
        """Batches from `start_step` on, without end."""
        samples, step = self._samples(), self.start_step
        while True:
            batch = [*islice(samples, self.batch_size)]
            step += 1
            epoch, index, _ = batch[-1]
            place = index // self.num_processes + 1
            self._states.pop(step - self.ahead - 1, None)
            self._states[step] = {"epoch": epoch, "place": place, "rows": self.rows.state_dict()}
            yield batch

    def state_at(self, step: int) -> dict[str, Any]:
        """Where the stream was after the batches before a step of the last `ahead`, as JSON."""
        return self._states[step]

    def _samples(self) -> Iterator[tuple[int, int, Row]]:
        epoch, place = self.state["epoch"], self.state["place"]
        while True:
            self.rows.set_epoch(epoch)
            for row in _read(self.rows):
                yield epoch, place * self.num_processes + self.process_index, row
                place += 1
            if place == 0:
                raise ValueError(
                    f"`--dataset_name` must have a row for each of {self.num_processes} processes, and process "
                    f"{self.process_index} found none in its part of the stream."
                )
            epoch, place = epoch + 1, 0


def _read(rows: datasets.IterableDataset) -> Iterator[Row]:
    try:
        yield from rows
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(" .")
        raise ValueError(
            f"`--dataset_name` must have readable files: {reason}. Take out one that is damaged or has no rows."
        ) from error
