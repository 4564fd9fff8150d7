"""Latents that are encoded once, before training, and read from a memory-mapped file.

What is kept is the posterior's mean and standard deviation, so that every epoch draws a sample of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.utils import tqdm
from diffusers import ModelMixin
from torch.utils.data import DataLoader, Dataset

from ...caches import build_folder, content_key
from ...latents import LatentNormalization, encode_moments, sample_posterior
from ..randomness import Draw, generator_for, posterior_generators
from .images import ImageTransform
from .samples import ImageDataset
from .training_images import TrainingImages


# Part of every cache's name: to be changed whenever what the files mean changes.
_FORMAT = 4
_MOMENTS, _SIZES = "moments.npy", "sizes.npy"


class LatentDataset(Dataset):
    """Latents of a folder that [`cache_latents`] made, as samples of (seed, epoch, index).

    A sample equals the one that encoding on the fly gives: the same flip, and the posterior's sample that
    [`posterior_generators`] draws.
    """

    def __init__(
        self,
        folder: Path,
        images: TrainingImages,
        transform: ImageTransform,
        normalization: LatentNormalization,
        *,
        seed: int,
    ):
        self.folder = folder
        self.transform = transform
        self.normalization = normalization
        self.seed = seed
        self.labels = images.labels
        # Width and height of every image as it was.
        self.sizes = np.load(folder / _SIZES)

    @cached_property
    def moments(self) -> np.ndarray:
        """`(images, views, moments, channels, height, width)`, float32: as it is and flipped; mean and deviation."""
        return np.load(self.folder / _MOMENTS, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        # A memory map is pickled as all of its content; a worker opens its own.
        return {name: value for name, value in self.__dict__.items() if name != "moments"}

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        """As [`~diffusers_dtr.training.data.samples.ImageDataset`], with normalised `latents` for its pixels."""
        epoch, index = item
        augmentation = self.transform.draw(generator_for(Draw.AUGMENTATION, self.seed, epoch, index))
        moments = self.moments[index : index + 1, int(augmentation.flip)]
        mean, std = _split_moments(torch.from_numpy(moments.copy()))
        latents = sample_posterior(mean, std, posterior_generators(self.seed, [epoch], [index]))
        sample = {"latents": self.normalization.normalize(latents)[0], "epoch": epoch, "index": index}
        if self.labels is not None:
            sample["labels"] = int(self.labels[index])
        return sample | self.transform.micro_conditions(tuple(self.sizes[index].tolist()), augmentation)


def cache_latents(
    vae: ModelMixin,
    images: TrainingImages,
    transform: ImageTransform,
    cache_dir: str | os.PathLike,
    *,
    seed: int,
    batch_size: int = 32,
    num_workers: int = 0,
) -> LatentDataset:
    """Encodes every image once, or finds that this was done before, in this run or another.

    A cache belongs to one dataset, VAE (its config and weights) and transform; anything else makes a new one. It is
    written under another name and renamed when it is complete. With several processes, let the main one go first.
    A cache takes 8 bytes per latent value and image, 16 with flips, of which both views are encoded: 42 and 84 GB for
    ImageNet's 256×256 images.
    """
    normalization = LatentNormalization.from_vae(vae)
    folder = Path(cache_dir) / f"latents-{_content_key(vae, images, transform)}"
    upright = ImageDataset(images, replace(transform, random_flip=False), seed=seed)
    loader = DataLoader(
        upright,
        batch_size,
        sampler=((0, index) for index in range(len(images))),
        num_workers=num_workers,
        collate_fn=list,
        # Else the global generator would go on, and a run that finds the cache would differ from this one.
        generator=torch.Generator(),
    )
    build_folder(folder, lambda partial: _write(partial, vae, loader, len(images), transform.random_flip))
    return LatentDataset(folder, images, transform, normalization, seed=seed)


def _write(folder: Path, vae: ModelMixin, batches: Iterable[list[dict]], num_images: int, flips: bool) -> None:
    sizes = []
    # Written, not mapped: on a full disk a write raises an error, where a memory map ends the process.
    with open(folder / _MOMENTS, "wb") as file, tqdm(total=num_images, desc="Caching latents") as progress_bar:
        for samples in batches:
            pixel_values = torch.stack([sample["pixel_values"] for sample in samples])
            views = (pixel_values, pixel_values.flip(-1)) if flips else (pixel_values,)
            moments = torch.stack([_stack_moments(*encode_moments(vae, view)) for view in views], dim=1).cpu().numpy()
            if file.tell() == 0:
                header = {"descr": "<f4", "fortran_order": False, "shape": (num_images, *moments.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(moments.astype("<f4").tobytes())
            sizes += [sample["original_size"].flip(0).tolist() for sample in samples]
            progress_bar.update(len(samples))
    np.save(folder / _SIZES, np.array(sizes))


def _stack_moments(mean: torch.Tensor, std: torch.Tensor | None) -> torch.Tensor:
    return torch.stack([mean] if std is None else [mean, std], dim=1)


def _split_moments(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    mean, *std = moments.unbind(1)
    return mean, std[0] if std else None


def _content_key(vae: ModelMixin, images: TrainingImages, transform: ImageTransform) -> str:
    description = {
        "format": _FORMAT,
        # `datasets` has no other name for a dataset's content, and documents this one for looking at.
        "dataset": images.dataset._fingerprint,
        "image_column": images.image_column,
        "transform": asdict(transform),
        "vae": type(vae).__name__,
        # Names with an underscore tell where it was loaded from and by which version.
        "vae_config": {name: value for name, value in vae.config.items() if not name.startswith("_")},
    }
    return content_key(description, [vae])
