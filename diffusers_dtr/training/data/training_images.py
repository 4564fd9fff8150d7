"""Which images, labels and captions to train on: found by 🤗 datasets and checked before training starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any
from unicodedata import normalize

import datasets
import numpy as np
import torch
from PIL import Image

from ..randomness import Draw, generator_for
from .captions import Captions
from .image_folder import METADATA, image_paths, load_image_folder, report, scan_folder, unzip
from .images import UnreadableImageError, decode_image, upright_size


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingImages:
    """Images, encoded in a column of the rows of a dataset, and what is known of them.

    The `labels` `(rows,)`, int64, are in [0, num_classes), and `id2label` has the names of classes.
    """

    dataset: datasets.Dataset
    image_column: str
    labels: np.ndarray | None = None
    num_classes: int | None = None
    id2label: dict[int, str] | None = None
    captions: Captions | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def classes(self) -> list[int]:
        """The labels that the images have, in ascending order."""
        return np.unique(self.labels).tolist()

    @property
    def file_names(self) -> list[str]:
        """Those of all rows, without folders; empty where a row has none."""
        return [os.path.basename(path or "") for path in image_paths(self.dataset, self.image_column)]

    def draw(self, count: int, seed: int) -> TrainingImages:
        """Some of the images, drawn without replacement, with the classes of all."""
        order = torch.randperm(len(self), generator=generator_for(Draw.SUBSET, seed, 0, 0))
        rows = order[:count].sort().values.numpy()
        return replace(
            self,
            dataset=self.dataset.select(rows),
            labels=None if self.labels is None else self.labels[rows],
            captions=None if self.captions is None else self.captions.select(rows),
        )

    def read(self, row: int) -> Image.Image:
        """Decodes a row's image, see [`~diffusers_dtr.training.data.images.decode_image`]."""
        return read_image(self.dataset[row][self.image_column], f"row {row}")

    def size(self, row: int) -> tuple[int, int]:
        """Width and height of a row's image, from its header."""
        return read_image(self.dataset[row][self.image_column], f"row {row}", upright_size)

    def label(self, row: int) -> int:
        """The label of a row."""
        return int(self.labels[row])


def read_image(encoded: dict | None, place: str, read: Callable[[dict | None], Any] = decode_image) -> Any:
    """What `read` returns of an image, by default decoded; the error names its file, if it has one, and its place."""
    try:
        return read(encoded)
    except UnreadableImageError as error:
        name = f"{encoded['path']} ({place})" if encoded and encoded["path"] else place
        message = f"The image {name} cannot be read: {error}. Replace it, or leave it out."
        raise UnreadableImageError(message) from error


def load_training_images(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | os.PathLike | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str | None = "label",
    caption_column: str | None = None,
    min_classes: int = 2,
    cache_dir: str | os.PathLike | None = None,
) -> TrainingImages:
    """Finds images, and checks their columns, labels and captions without decoding any."""
    columns = {"image_column": image_column, "label_column": label_column, "caption_column": caption_column}
    if train_data_dir is None:
        if os.path.isdir(dataset_name):  # whose files 🤗 datasets lists some sixty times
            logger.info(
                f"{dataset_name}: 🤗 datasets looks for files, which takes minutes for 100 000 images in every run. "
                "For a folder of images `--train_data_dir` takes seconds."
            )
        dataset = datasets.load_dataset(dataset_name, dataset_config_name, split=split, cache_dir=cache_dir)
    else:
        dataset = load_image_folder(train_data_dir, **columns, min_classes=min_classes, cache_dir=cache_dir)
    images = training_images(dataset, **columns)
    images = replace(images, dataset=_unzipped(images.dataset, image_column, cache_dir))
    if train_data_dir is None and os.path.isdir(dataset_name):
        files, used = scan_folder(dataset_name, cache_dir), {*image_paths(images.dataset, image_column)}
        if not used.isdisjoint(file.path for file in files):  # else the images are in tables
            used |= {file.path for file in files if file.kind == METADATA}
            report(dataset_name, files, used, f"not in the split {split!r} as 🤗 datasets reads the folder")
    return images


def _unzipped(dataset: datasets.Dataset, column: str, cache_dir: str | os.PathLike | None) -> datasets.Dataset:
    """The same images, but those of zip files as files: finding one in a zip file takes as long as listing it."""

    def local(path: str | None) -> str | None:
        inside, _, archive = (path or "").removeprefix("zip://").partition("::")
        return os.path.join(unzip(archive, cache_dir), inside) if os.path.isfile(archive) else path

    paths = image_paths(dataset, column)
    if not any(path is not None and path.startswith("zip://") for path in paths):
        return dataset
    result = datasets.Dataset.from_dict({column: [*map(local, paths)]}, dataset.features)
    result._fingerprint = dataset._fingerprint
    return result


def training_images(
    dataset: datasets.Dataset,
    image_column: str = "image",
    label_column: str | None = "label",
    caption_column: str | None = None,
) -> TrainingImages:
    """The checks of [`load_training_images`], for a dataset that is loaded already."""
    if len(dataset) == 0:
        raise ValueError("`dataset` must have at least one row, got an empty one.")
    columns = {"image_column": image_column, "caption_column": caption_column, "label_column": label_column}
    check_columns(dataset.features, columns)
    # Undecoded, so that a file that cannot be decoded can be named.
    images = dataset.select_columns([image_column]).with_format(None)
    images = images.cast_column(image_column, datasets.Image(decode=False))
    captions = None if caption_column is None else Captions(dataset, caption_column)
    if label_column is None:
        return TrainingImages(images, image_column, captions=captions)
    labels, num_classes, id2label = _read_labels(dataset, label_column)
    return TrainingImages(images, image_column, labels, num_classes, id2label, captions)


def check_columns(features: datasets.Features, columns: dict[str, str | None]) -> None:
    """Refuse columns, by their arguments, that there are not, or an `image_column` of other things."""
    for argument, column in columns.items():
        if column is not None and column not in features:
            raise ValueError(
                f"`{argument}` must be one of the dataset's columns, {', '.join(features)}, got "
                f"{column!r}. Choose another with `--{argument}`."
            )
    image_column = columns["image_column"]
    feature = features[image_column]
    if not isinstance(feature, datasets.Image):
        raise ValueError(
            f"`image_column` must name a column of images, got {image_column!r}, which holds {feature}. Choose the "
            "column with `--image_column`, or cast it to `datasets.Image()`."
        )


def check_label_feature(features: datasets.Features, column: str) -> list[str] | None:
    """The names of the classes of a column, or None if they have none; refuses one that holds no classes."""
    feature = features[column]
    if not isinstance(feature, (datasets.ClassLabel, datasets.Value)) or "int" not in feature.dtype:
        raise ValueError(
            f"`label_column` must hold class labels or integers, got {column!r}, which holds {feature}. Choose "
            "another with `--label_column`, or make class labels of it with `dataset.class_encode_column`."
        )
    names = getattr(feature, "names", None)
    # Some file systems write an accent as a character of its own.
    return None if names is None else [normalize("NFC", name) for name in names]


def _read_labels(dataset: datasets.Dataset, column: str) -> tuple[np.ndarray, int, dict[int, str] | None]:
    """The labels of all rows, the number of classes and their names."""
    names = check_label_feature(dataset.features, column)
    rows = dataset.select_columns([column]).with_format("arrow")[:].column(column)
    if rows.null_count:
        row = int(np.argmax(rows.is_null().to_numpy()))
        raise ValueError(f"`label_column` must have a label in every row, got none in row {row} of {column!r}.")
    labels = rows.to_numpy().astype(np.int64)
    num_classes = int(labels.max()) + 1 if names is None else len(names)
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"`label_column` must hold labels in [0, {num_classes}), got {labels[row]} in row {row} of {column!r} "
            f"({int(wrong.sum())} such rows). Choose another with `--label_column`."
        )
    shown = names or [str(number) for number in range(num_classes)]
    logger.info(f"{num_classes} classes: {first_names(shown)}.")
    without = [shown[number] for number in np.setdiff1d(range(num_classes), labels)]
    if without:
        logger.warning(f"{len(without)} of them have no image: {first_names(without)}.")
    return labels, num_classes, None if names is None else dict(enumerate(names))


def first_names(names: Iterable[str], count: int = 10) -> str:
    """Some names, and how many there are."""
    names = list(names)
    return ", ".join(names[:count]) + (f", … ({len(names)} in all)" if len(names) > count else "")
