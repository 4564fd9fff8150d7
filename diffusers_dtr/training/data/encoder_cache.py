"""What frozen encoders make of images and prompts, once, before training: in files that are memory-mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets.utils import tqdm
from diffusers import ModelMixin
from torch.utils.data import DataLoader

from ...caches import build_folder, content_key
from ...latents import LatentNormalization, encode_moments, sample_posterior
from ..randomness import posterior_generators
from .images import Augmentation, ImageTransform
from .samples import ImageDataset
from .training_images import TrainingImages


if TYPE_CHECKING:
    from .buckets import AspectRatioBuckets
    from .latent_shards import LatentShards


# Tensors of as many rows, or lists of rows that differ in length, by name.
Rows = dict[str, torch.Tensor | list[torch.Tensor]]

# Part of every cache's name: to be changed whenever what the files mean changes.
FORMAT = 7
_INDEX = "index.json"


class CachedRows:
    """Rows of named tensors in the files of a folder, read as they are needed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._layouts = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        self._files, self._ends = {}, {}
        for name, layout in self._layouts.items():
            layout["shapes"] = np.array(layout["shapes"], dtype=np.int32)
            layout["dtype"] = getattr(torch, layout["dtype"])
            self._files[name] = np.memmap(folder / name, mode="r")
            self._ends[name] = layout["shapes"].prod(1, dtype=np.int64).cumsum() * layout["dtype"].itemsize
            if self._files[name].size != self._ends[name][-1]:
                expected, found = self._ends[name][-1], self._files[name].size
                raise ValueError(f"{folder / name} must have {expected} bytes, got {found}: delete {folder}.")

    def __len__(self) -> int:
        return len(next(iter(self._ends.values())))

    @classmethod
    def made_once(cls, folder: Path, batches: Callable[[], Iterable[Rows]]) -> CachedRows:
        """Those of all batches, which are asked for unless the folder is there; it is written atomically."""
        build_folder(folder, lambda partial: _write(partial, batches()))
        return cls(folder)

    def __reduce__(self):
        # A memory map is pickled as all of its content; a worker opens its own.
        return CachedRows, (self.folder,)

    def read(self, places: list[int]) -> Rows:
        """Some rows of every tensor, in memory of their own."""
        rows = {name: [self._row(name, place) for place in places] for name in self._layouts}
        return {name: torch.stack(rows[name]) if self._layouts[name]["stacked"] else rows[name] for name in rows}

    def _row(self, name: str, place: int) -> torch.Tensor:
        layout, ends = self._layouts[name], self._ends[name]
        content = self._files[name][ends[place - 1] if place else 0 : ends[place]]
        return torch.from_numpy(np.array(content)).view(layout["dtype"]).view(*layout["shapes"][place])


def _write(folder: Path, batches: Iterable[Rows]) -> None:
    layouts = {}
    for batch in batches:
        for name, rows in batch.items():
            dtype, stacked = str(rows[0].dtype).removeprefix("torch."), isinstance(rows, torch.Tensor)
            layout = layouts.setdefault(name, {"dtype": dtype, "stacked": stacked, "shapes": []})
            # Written, not mapped: on a full disk a write raises an error, where a memory map ends the process.
            with open(folder / name, "ab") as file:
                for row in rows:
                    layout["shapes"].append(row.shape)
                    file.write(row.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    (folder / _INDEX).write_text(json.dumps(layouts), encoding="utf-8")


@dataclass(eq=False)
class LatentDataset(ImageDataset):
    """Images as normalised `latents`, those that encoding on the fly gives: the same flips, the same samples."""

    rows: CachedRows | LatentShards
    normalization: LatentNormalization

    def _read(self, epoch: int, index: int, augmentation: Augmentation) -> tuple[dict[str, Any], tuple[int, int]]:
        row = self.rows.read([index if self.buckets is None else self.buckets.place(index)])
        mean, *std = row["moments"][:, int(augmentation.flip)].unbind(1)
        generators = posterior_generators(self.seed, [epoch], [index])
        latents = sample_posterior(mean, std[0] if std else None, generators)
        return {"latents": self.normalization.normalize(latents)[0]}, tuple(row["original_size"][0].tolist()[::-1])


def cache_latents(
    vae: ModelMixin,
    images: TrainingImages,
    transform: ImageTransform,
    cache_dir: str | os.PathLike,
    *,
    seed: int,
    batch_size: int = 32,
    num_workers: int = 0,
    buckets: AspectRatioBuckets | None = None,
) -> LatentDataset:
    """Encodes every image once, or finds that this was done before, in this run or another.

    A cache belongs to one dataset, VAE (its config and weights) and transform; anything else makes a new one. It holds
    the posterior's mean and standard deviation, so that every epoch draws a sample of its own: 8 bytes per latent
    value and image, 16 with flips, of which both views are encoded: 42 and 84 GB for ImageNet's 256×256 images. With
    several processes, let the main one go first. A `ValueError` if the VAE does not tell its latents' normalisation.
    """
    normalization = LatentNormalization.from_vae(vae)
    description = {
        "format": FORMAT,
        # `datasets` has no other name for a dataset's content, and documents this one for looking at.
        "dataset": images.dataset._fingerprint,
        "image_column": images.image_column,
        "transform": asdict(transform),
        "buckets": None if buckets is None else buckets.sizes,
        **describe_autoencoder(vae),
    }
    folder = Path(cache_dir) / f"latents-{content_key(description, [vae])}"
    alike = [range(len(images))] if buckets is None else buckets.rows
    batches = [rows[start : start + batch_size] for rows in alike for start in range(0, len(rows), batch_size)]
    rows = CachedRows.made_once(folder, lambda: encoded(vae, images, transform, batches, num_workers, buckets))
    return LatentDataset(images, transform, seed=seed, buckets=buckets, rows=rows, normalization=normalization)


def describe_autoencoder(vae: ModelMixin) -> dict[str, Any]:
    """What latents depend on of an autoencoder, beside its weights."""
    # Names with an underscore tell where it was loaded from and by which version.
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    return {"vae": type(vae).__name__, "vae_config": config}


def encoded(
    vae: ModelMixin,
    images: TrainingImages,
    transform: ImageTransform,
    batches: Sequence[Sequence[int]],
    num_workers: int,
    buckets: AspectRatioBuckets | None = None,
) -> Iterator[Rows]:
    """`moments` `(batch, views, moments, channels, height, width)`: as it is and flipped; mean and deviation."""
    loader = DataLoader(
        ImageDataset(images, replace(transform, random_flip=False), seed=0, buckets=buckets),
        batch_sampler=[[(0, row) for row in rows] for rows in batches],
        num_workers=num_workers,
        # Else the global generator would go on, and a run that finds the cache would differ from this one.
        generator=torch.Generator(),
    )
    for batch in tqdm(loader, "Caching latents", unit="batch"):
        views = [batch["pixel_values"], batch["pixel_values"].flip(-1)][: 1 + transform.random_flip]
        moments = [[part for part in encode_moments(vae, view) if part is not None] for view in views]
        stacked = torch.stack([torch.stack(parts, dim=1) for parts in moments], dim=1)
        yield {"moments": stacked.cpu(), "original_size": batch["original_size"]}
