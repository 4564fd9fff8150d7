"""Latents of images in sharded files, with labels and captions: what a run trains from without an autoencoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import torch
from diffusers import ModelMixin
from safetensors import safe_open

from ...caches import content_key, fingerprint
from ...config_types import read_object
from ...latents import LatentNormalization
from .encoder_cache import LatentDataset, Rows, describe_autoencoder
from .images import ImageTransform
from .training_images import TrainingImages, training_images


INDEX, IMAGES = "latents.json", "images"
# To be changed whenever what the files mean changes.
_FORMAT = 1


@dataclass(frozen=True)
class LatentShards:
    """Rows of `moments` and `original_size` in files of `shard_size` rows each, read as they are needed."""

    folder: Path
    num_rows: int
    shard_size: int

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"latents-{number:05d}-of-{len(self):05d}.safetensors"

    def rows(self, number: int) -> range:
        """The rows that a shard has."""
        return range(self.num_rows)[number * self.shard_size : (number + 1) * self.shard_size]

    def __len__(self) -> int:
        return -(-self.num_rows // self.shard_size)

    def read(self, places: list[int]) -> Rows:
        """Some rows of every tensor."""
        rows = [self._row(*divmod(place, self.shard_size)) for place in places]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _row(self, number: int, place: int) -> Rows:
        file = _opened(self.path(number))
        return {name: file.get_slice(name)[place : place + 1] for name in file.keys()}  # noqa: SIM118 - no mapping


@lru_cache(maxsize=256)
def _opened(path: Path) -> safe_open:
    return safe_open(path, "pt")


def read_index(folder: Path) -> dict[str, Any]:
    """The settings that the latents of a folder were made with."""
    index = read_object(folder / INDEX, str(folder / INDEX))
    if index.get("format") != _FORMAT:
        raise ValueError(f"{folder} must have `format` {_FORMAT} in {INDEX}, got {index.get('format')}: make it anew.")
    return index


def latent_settings(vae: ModelMixin, transform: ImageTransform) -> dict[str, Any]:
    """What latents depend on beside images, by the words of messages."""
    name, config = describe_autoencoder(vae).values()
    return json.loads(
        json.dumps(
            {
                "format": _FORMAT,
                **asdict(transform),
                "autoencoder": f"{name} in {vae.dtype}",
                "weights of the autoencoder": fingerprint(sorted(vae.state_dict().items()))[:16],
                "config of the autoencoder": content_key(config, [])[:16],
            }
        )
    )


def check_index(found: Mapping[str, Any], wanted: Mapping[str, Any], place: str, advice: str) -> None:
    """Refuse a place whose settings are not what is wanted."""
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        listed = ", ".join(f"`{name}` is {found.get(name)} there and {wanted[name]} here" for name in differing)
        raise ValueError(
            f"{place} holds latents of other images, another autoencoder or transform: {listed}. {advice}"
        )


def load_precomputed_images(
    folder: str, image_column: str, label_column: str | None, caption_column: str | None
) -> TrainingImages:
    """The images of a folder's latents with labels or captions, but without pixels."""
    if not all((Path(folder) / name).exists() for name in (INDEX, IMAGES)):
        raise ValueError(f"`--latents_dir` must be a folder that precompute_latents.py made, got {folder!r}.")
    dataset = datasets.load_from_disk(Path(folder) / IMAGES)
    if image_column in dataset.column_names:  # else the checks say so
        dataset = dataset.cast_column(image_column, datasets.Image())
    return training_images(dataset, image_column, label_column, caption_column)


def load_precomputed_latents(
    folder: str, images: TrainingImages, vae: ModelMixin, transform: ImageTransform, *, seed: int
) -> LatentDataset:
    """The latents of a folder, of all of its images.

    A `ValueError` for a folder that lacks shards, or is of another autoencoder, another precision of it or another
    transform; one that has flips serves a run without.
    """
    index, wanted = read_index(Path(folder)), latent_settings(vae, transform)
    if index["random_flip"] and not transform.random_flip:
        del wanted["random_flip"]
    check_index(index, wanted, f"`--latents_dir`={folder!r}", "Train with what it was made with, or make another.")
    shards = LatentShards(Path(folder), index["num_rows"], index["shard_size"])
    missing = [number for number in range(len(shards)) if not shards.path(number).is_file()]
    if missing:
        raise ValueError(
            f"`--latents_dir`={folder!r} lacks {len(missing)} of its {len(shards)} shards: run precompute_latents.py "
            "again with the same flags, and it goes on."
        )
    return LatentDataset(images, transform, seed=seed, rows=shards, normalization=LatentNormalization.from_vae(vae))
