"""Latents of images in sharded files, with labels and captions: what a run trains from without an autoencoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open

from ...atomic_files import replace_text
from ...caches import content_key, fingerprint
from ...config_types import read_object
from ...latents import LatentNormalization
from .encoder_cache import LatentDataset, Rows, describe_autoencoder
from .images import ImageTransform
from .training_images import TrainingImages, training_images


IMAGES = "images"


@dataclass(frozen=True)
class Shards:
    """Rows in files or folders of `shard_size` rows each, and an index that tells what all of them were made from."""

    folder: Path
    num_rows: int
    shard_size: int

    index: ClassVar[str]
    # To be changed whenever what the files mean changes
    format: ClassVar[int]
    pattern: ClassVar[str]
    of_others: ClassVar[str]

    @classmethod
    def read_index(cls, folder: Path) -> dict[str, Any]:
        """The settings that the shards of a folder were made with."""
        path = folder / cls.index
        if not path.is_file():
            raise ValueError(f"{folder} must have a {cls.index}, which says what its shards are of: make it anew.")
        index = read_object(path, str(path), {"format": int, "num_rows": int, "shard_size": int})
        if index.get("format") != cls.format:
            found = index.get("format")
            raise ValueError(f"{folder} must have `format` {cls.format} in {cls.index}, got {found}: make it anew.")
        for name in ("num_rows", "shard_size"):
            if index.get(name, 0) < 1:
                raise ValueError(f"`{name}` of {path} must be at least 1, got {index.get(name)}: make {folder} anew.")
        return index

    @classmethod
    def check(cls, found: Mapping[str, Any], wanted: Mapping[str, Any], place: str, advice: str) -> None:
        """Refuse a place whose settings are not what is wanted."""
        differing = [name for name in wanted if found.get(name) != wanted[name]]
        if differing:
            listed = ", ".join(f"`{name}` is {found.get(name)} there and {wanted[name]} here" for name in differing)
            raise ValueError(f"{place} holds {cls.of_others}: {listed}. {advice}")

    @classmethod
    def complete(cls, folder: Path, index: Mapping[str, Any]) -> Shards:
        """The shards of a folder, none of which may be missing or damaged."""
        shards = cls(folder, index["num_rows"], index["shard_size"])
        shards.check_whole()
        if shards.missing:
            raise ValueError(
                f"`--latents_dir`={str(folder)!r} lacks {len(shards.missing)} of its {len(shards)} shards: run "
                "precompute_latents.py again with the same flags, and it goes on."
            )
        return shards

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write what the shards will be of, or check that those that are there are of the same."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {"format": self.format, **settings, "num_rows": self.num_rows, "shard_size": self.shard_size}
        if (self.folder / self.index).exists():
            place = f"`--output_dir`={str(self.folder)!r}"
            self.check(self.read_index(self.folder), settings, place, "Choose another folder, or remove it.")
            self.check_whole()
        elif any(self.folder.glob(self.pattern.partition("{")[0] + "*")):
            raise ValueError(f"`--output_dir`={str(self.folder)!r} has shards, but no {self.index} that says of what.")
        replace_text(self.folder / self.index, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    def path(self, number: int) -> Path:
        """The file or folder of a shard, which is whole or not there."""
        return self.folder / self.pattern.format(number, len(self))

    def rows(self, number: int) -> range:
        """The rows that a shard has."""
        return range(self.num_rows)[number * self.shard_size : (number + 1) * self.shard_size]

    def check_whole(self) -> None:
        """Refuse a shard that is there but damaged, whose file the error names."""
        for number in sorted({*range(len(self))} - {*self.missing}):
            path, expected = self.path(number), len(self.rows(number))
            try:
                found, reason = self.count(path), ""
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                found, reason = "a damaged one", f" ({error})"
            if found != expected:
                raise ValueError(
                    f"{path} must be a shard of {expected} rows, got {found}{reason}: delete it, and run "
                    "precompute_latents.py again with the same flags."
                )

    def count(self, path: Path) -> int:
        """The number of rows in a shard."""
        raise NotImplementedError  # latents and texts are in files of different kinds

    @property
    def missing(self) -> list[int]:
        """The shards that are still to be made."""
        return [number for number in range(len(self)) if not self.path(number).exists()]

    def __len__(self) -> int:
        return -(-self.num_rows // self.shard_size)


class LatentShards(Shards):
    """Rows of `moments` and `original_size` in safetensors, read as they are needed."""

    index, format, pattern = "latents.json", 1, "latents-{:05d}-of-{:05d}.safetensors"
    of_others = "latents of other images, another autoencoder or transform"

    def count(self, path: Path) -> int:
        """As [`Shards.count`]; what is not the same for all tensors is 0."""
        with safe_open(path, "pt") as file:
            counts = {file.get_slice(name).get_shape()[0] for name in file.keys()}  # noqa: SIM118 - no mapping
        return counts.pop() if len(counts) == 1 else 0

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


def latent_settings(vae: ModelMixin, transform: ImageTransform) -> dict[str, Any]:
    """What latents depend on beside images, by the words of messages."""
    name, config = describe_autoencoder(vae).values()
    return json.loads(
        json.dumps(
            {
                **asdict(transform),
                "autoencoder": f"{name} in {vae.dtype}",
                "weights of the autoencoder": fingerprint(sorted(vae.state_dict().items()))[:16],
                "config of the autoencoder": content_key(config, [])[:16],
            }
        )
    )


def load_precomputed_images(
    folder: str, image_column: str, label_column: str | None, caption_column: str | None
) -> TrainingImages:
    """The images of a folder's latents with labels or captions, but without pixels."""
    if not all((Path(folder) / name).exists() for name in (LatentShards.index, IMAGES)):
        raise ValueError(f"`--latents_dir` must be a folder that precompute_latents.py made, got {folder!r}.")
    try:
        dataset = datasets.load_from_disk(Path(folder) / IMAGES)
    except (OSError, ValueError) as error:
        raise ValueError(f"{Path(folder) / IMAGES} is damaged: make {folder} anew. {error}") from error
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
    index = LatentShards.read_index(Path(folder))
    wanted = {**latent_settings(vae, transform), "num_rows": len(images)}
    if index.get("random_flip") is True and not transform.random_flip:
        del wanted["random_flip"]
    advice = "Train with what it was made with, or make another."
    LatentShards.check(index, wanted, f"`--latents_dir`={folder!r}", advice)
    shards, normalization = LatentShards.complete(Path(folder), index), LatentNormalization.from_vae(vae)
    return LatentDataset(images, transform, seed=seed, rows=shards, normalization=normalization)
