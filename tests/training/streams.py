"""Datasets as they are streamed: parquet files and WebDataset tars of small images."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import datasets
from PIL import Image


def encoded(image: Image.Image) -> bytes:
    """An image as the content of a PNG file."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def grey(number: int) -> Image.Image:
    return Image.new("L", (8, 8), number)


def make_parquet(
    folder: Path, images: Sequence[Image.Image], labels: Sequence[int], files: int = 2, **columns
) -> Path:
    """Rows in order, as many in every file."""
    folder.mkdir(parents=True)
    names = "abcdefgh"[: max(labels) + 1]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    features |= {name: datasets.Value("string") for name in columns}
    rows = {"image": [{"bytes": encoded(image), "path": None} for image in images], "label": labels, **columns}
    whole = datasets.Dataset.from_dict(rows, datasets.Features(features))
    for number in range(files):
        whole.shard(files, number, contiguous=True).to_parquet(folder / f"train-{number}.parquet")
    return folder


def make_tars(
    folder: Path, images: Sequence[Image.Image], labels: Sequence[int], captions: Sequence[str] = ()
) -> Path:
    """One file of images `png`, labels `cls` and captions `txt`."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for number, image in enumerate(images):
            parts = {"png": encoded(image), "cls": str(labels[number]).encode()}
            parts |= {"txt": captions[number].encode()} if captions else {}
            for suffix, content in parts.items():
                entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return folder
