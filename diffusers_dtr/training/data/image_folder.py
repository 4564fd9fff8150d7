"""What of a folder is trained on: every file in it is used, or counted with the reason why it is not."""

from __future__ import annotations

import glob
import logging
import os
import unicodedata
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
from PIL import Image

from ...caches import build_folder, content_key
from ...run_record import RECORD_FILE, RUN_CONFIG, RUN_LOCK


logger = logging.getLogger(__name__)

IMAGE, METADATA, OTHER = "image", "of metadata that no flag asks for", "not of a format that Pillow opens"
# Pillow tells these formats, but decodes none of their files.
_STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}
_EXAMPLES = 3
# A zip file of more bytes than this must not grow more than so many times.
_MAX_UNPACKED, _MAX_RATIO = 10**8, 50


@dataclass(frozen=True)
class FoundFile:
    """A file of a folder: whether it is an image or of metadata, or why it is neither.

    Its `place` is its path in the folder, as though zip files were unpacked where they lie.
    """

    path: str
    place: str
    kind: str

    @property
    def top_folder(self) -> str | None:
        """The folder at the top that it is in, or None for a file at the top."""
        top, slash, _ = self.place.partition("/")
        return unicodedata.normalize("NFC", top) if slash else None


@cache
def image_suffixes() -> frozenset[str]:
    """The endings of files that Pillow opens, in lower case, such as ".png"."""
    Image.init()
    readable = Image.OPEN.keys() - _STUBS
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in readable)


def scan_folder(folder: str | os.PathLike, cache_dir: str | os.PathLike | None = None) -> list[FoundFile]:
    """All files of a folder, of what links in it lead to and of its zip files, in the order of their places."""
    if not os.path.isdir(folder):
        raise ValueError(f"`train_data_dir` must be a folder, got {os.fspath(folder)!r}.")
    logger.info(f"{os.fspath(folder)}: looking for images, which takes some seconds for 100 000 files.")
    files: list[FoundFile] = []

    def visit(path: str, place: str, hidden: bool, above: frozenset[str]) -> None:
        inside = above | {os.path.realpath(path)}
        of_run = any(os.path.lexists(os.path.join(path, name)) for name in (RECORD_FILE, RUN_CONFIG, RUN_LOCK))
        if inside == above or (place and of_run):
            kind = "links to a folder that they are in" if inside == above else "folders of training runs"
            files.append(FoundFile(path, place.rstrip("/"), kind))
            return
        with os.scandir(path) as entries:
            for entry in entries:
                is_hidden = hidden or entry.name.startswith(".") or entry.name == "__MACOSX"
                if entry.is_dir():
                    visit(entry.path, f"{place}{entry.name}/", is_hidden, inside)
                elif not is_hidden and entry.is_file() and entry.name.lower().endswith(".zip"):
                    visit(unzip(entry.path, cache_dir), place, False, inside)
                else:
                    kind = "hidden" if is_hidden else _kind(entry)
                    files.append(FoundFile(entry.path, place + entry.name, kind))

    visit(os.path.abspath(folder), "", False, frozenset())
    return sorted(files, key=lambda file: (file.place.split("/"), file.path))


def _kind(entry: os.DirEntry) -> str:
    if not entry.is_file():
        return "links that lead nowhere" if entry.is_symlink() else "neither files nor folders"
    if entry.name in ("metadata.jsonl", "metadata.csv", "metadata.parquet"):
        return METADATA
    return IMAGE if os.path.splitext(entry.name)[1].lower() in image_suffixes() else OTHER


def unzip(archive: str, cache_dir: str | os.PathLike | None = None) -> str:
    """The folder into which a zip file was unpacked, once for each of its versions."""
    status = os.stat(archive)
    key = content_key({"path": os.path.realpath(archive), "size": status.st_size, "time": status.st_mtime_ns}, [])
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).absolute() / "unzipped" / key

    def unpack(partial: Path) -> None:
        with zipfile.ZipFile(archive) as file:
            claimed = sum(member.file_size for member in file.infolist())
            # Images are compressed already.
            if claimed > _MAX_UNPACKED and claimed > _MAX_RATIO * status.st_size:
                raise ValueError(f"The zip file {archive} of {status.st_size} bytes would unpack to {claimed}.")
            file.extractall(partial / "files")

    try:
        build_folder(folder, unpack)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # damaged, encrypted, of a rare method
        raise ValueError(f"The zip file {archive} cannot be unpacked: {error}.") from error
    return str(folder / "files")


def load_image_folder(
    folder: str | os.PathLike,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    caption_column: str | None = None,
    min_classes: int = 2,
    cache_dir: str | os.PathLike | None = None,
) -> datasets.Dataset:
    """The images of a folder as a dataset, with labels or captions, if they are asked for.

    Labels and captions come from the folder's metadata files, as in the imagefolder of 🤗 datasets. Without labels
    there, the folders at the top are the classes, however deep in them images lie. Without both, all images are used.
    """
    files = scan_folder(folder, cache_dir)
    images = [file for file in files if file.kind == IMAGE]
    metadata = [file for file in files if file.kind == METADATA]
    if not images and not metadata:
        raise ValueError(f"{_named(folder)} must hold images, found {found(files)}.")
    if metadata and (caption_column or label_column) is not None:
        rows = _read_metadata(folder, metadata, cache_dir)
        if caption_column is not None or label_column in rows.column_names:
            return _with_metadata(folder, files, rows, image_column)
    if caption_column is not None:
        raise ValueError(
            f"{_named(folder)} must have a metadata.jsonl, with `file_name` and {caption_column!r} of every image, "
            f"found {found(files)} and no metadata file. Folders of classes are for train_class_conditional.py."
        )
    if label_column is not None:
        images = [file for file in images if file.top_folder is not None]
    columns, features = {image_column: [file.path for file in images]}, {image_column: datasets.Image()}
    if label_column is None:
        _check_splits(folder, {file.top_folder for file in images})
    else:
        classes = sorted({file.top_folder for file in images})
        _check_classes(folder, files, classes, min_classes)
        features[label_column] = datasets.ClassLabel(names=classes)
        columns[label_column] = features[label_column].str2int([file.top_folder for file in images])
    report(folder, files, {*columns[image_column]}, "not in a class folder")
    return _fingerprinted(datasets.Dataset.from_dict(columns, datasets.Features(features)), images)


def report(folder: str | os.PathLike, files: list[FoundFile], used: set[str], unused_images: str) -> None:
    """Log how many files are used, and how many not and why."""
    unused = [file for file in files if file.path not in used]
    reasons = _counted(unused, lambda file: unused_images if file.kind == IMAGE else file.kind)
    left_out = f"; left out are {', '.join(reasons)}" if unused else ""
    logger.info(f"{os.fspath(folder)}: {len(files) - len(unused)} of {len(files)} files used{left_out}.")


def found(files: list[FoundFile]) -> str:
    """What a folder holds, in a few words."""
    images = _counted(
        [file for file in files if file.kind == IMAGE],
        lambda file: "in the folder itself" if file.top_folder is None else f"in {file.top_folder!r}",
    )
    others = _counted([file for file in files if file.kind not in (IMAGE, METADATA)], lambda file: file.kind)
    return ", ".join([f"images: {_examples(images)}", *others] if images else others) or "nothing"


def _counted(files: Iterable[FoundFile], what: Callable[[FoundFile], str]) -> list[str]:
    """How many files there are of each sort, with examples."""
    places: dict[str, list[str]] = {}
    for file in files:
        places.setdefault(what(file), []).append(file.place)
    return [f"{len(places[sort])} {sort} ({_examples(places[sort])})" for sort in places]


def _examples(texts: list[str]) -> str:
    return ", ".join(texts[:_EXAMPLES]) + (", …" if len(texts) > _EXAMPLES else "")


def _check_classes(folder: str | os.PathLike, files: list[FoundFile], classes: list[str], least: int) -> None:
    if len(classes) < least:
        hint = "Without classes, use train_unconditional.py."
        if len(classes) == 1:
            hint = f"If the folders in it are the classes, name {os.path.join(os.fspath(folder), classes[0])}. {hint}"
        raise ValueError(
            f"{_named(folder)} must have at least {least} class folders of images, found {found(files)}. {hint}"
        )
    nested = {file.top_folder for file in files if file.kind == IMAGE and file.place.count("/") > 1}
    if nested.issuperset(classes):
        _check_splits(folder, set(classes))
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
    empty = {unicodedata.normalize("NFC", name) for name in names} - {*classes, "__MACOSX"}
    if empty:
        logger.warning("Folders without images are no classes: %s.", ", ".join(sorted(empty)))


def _check_splits(folder: str | os.PathLike, tops: set[str | None]) -> None:
    """Refuse a folder of nothing but splits, of which one is meant."""
    if len(tops) > 1 and None not in tops and {name.lower() for name in tops} <= _SPLITS:
        names = sorted(tops)
        raise ValueError(
            f"{_named(folder)} must have images or a folder per class, found {', '.join(names)}, which are splits. "
            f"Name one of these, such as {os.path.join(os.fspath(folder), names[0])}."
        )


def _read_metadata(folder, metadata: list[FoundFile], cache_dir) -> datasets.Dataset:
    parts = []
    try:
        for file in metadata:  # one by one, because `datasets` puts several in an order that differs between processes
            if os.path.getsize(file.path) == 0:
                raise ValueError("it is empty")
            files = {"train": glob.escape(file.path)}
            parts.append(datasets.load_dataset("imagefolder", data_files=files, split="train", cache_dir=cache_dir))
        return datasets.concatenate_datasets(parts)
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        places = _examples([file.place for file in metadata])
        cause = error.__cause__ or error  # `datasets` says that there was an error
        raise ValueError(f"{_named(folder)} has metadata that cannot be read, {places}: {cause}") from error


def _with_metadata(folder, files: list[FoundFile], rows: datasets.Dataset, image_column: str) -> datasets.Dataset:
    if not isinstance(rows.features.get(image_column), datasets.Image):
        return rows  # the caller tells the columns that there are
    listed = [path for path in image_paths(rows, image_column) if path is not None]
    by_path = {file.path: file for file in files}
    missing = [path for path in listed if path not in by_path]
    if missing:
        raise ValueError(
            f"{_named(folder)} has metadata that list images which cannot be found ({len(missing)}): "
            f"{_examples(missing)}."
        )
    others = [file for file in files if file.kind != METADATA]
    report(folder, others, {*listed}, "not listed in the metadata")
    return _fingerprinted(rows, [by_path[path] for path in listed])


def image_paths(dataset: datasets.Dataset, column: str) -> list[str | None]:
    """The path of every row's image; None where it has none."""
    rows = dataset.select_columns([column]).with_format("arrow")[:].column(column)
    return [path for chunk in rows.chunks for path in chunk.field("path").to_pylist()]


def _fingerprinted(dataset: datasets.Dataset, images: Iterable[FoundFile]) -> datasets.Dataset:
    """Named by its files as they are now, so that what is made of them is made anew when they change."""
    states = [(file.place, status.st_size, status.st_mtime_ns) for file in images if (status := os.stat(file.path))]
    labels = [str(feature) for feature in dataset.features.values()]
    dataset._fingerprint = content_key({"files": states, "features": labels}, [])
    return dataset


def _named(folder: str | os.PathLike) -> str:
    return f"The image folder {os.fspath(folder)!r}"
