"""Latents of images, made ahead of training by several processes, which go on where they were interrupted."""

from __future__ import annotations

import json
import logging
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from diffusers import ModelMixin
from safetensors.torch import save_file

from ...atomic_files import PARTIAL_SUFFIX, replace_text, replacing
from ...caches import build_folder, content_key
from ...latents import LatentNormalization
from ..components import image_channels
from ..config import TrainingConfig
from .encoder_cache import encoded
from .images import ImageTransform
from .latent_shards import IMAGES, INDEX, LatentShards, check_index, latent_settings, read_index
from .loading import image_transform, load_images
from .training_images import TrainingImages


logger = logging.getLogger(__name__)


def precompute_latents(config: TrainingConfig, vae: ModelMixin, *, shard_size: int) -> Path:
    """Encodes the images of a configuration into its output folder, which all processes share; all must call this.

    Process p makes every `num_processes`-th shard from the p-th on, `train_batch_size` images at a time. A shard is
    written atomically, and one that is there is left as it is: a run that was interrupted goes on with the same call,
    of any number of processes. The folder holds the posterior's mean and standard deviation, of both views with
    `random_flip`: 8 or 16 bytes per latent value and image, and file names, labels and captions.

    Raises:
        ValueError: If the folder has latents of other images, labels or captions, of another autoencoder or in shards
            of another size, or the autoencoder does not tell its latents' normalisation.
    """
    state, folder = PartialState(), Path(config.run.output_dir)
    if config.data.resolution is None:
        raise ValueError("`--resolution` must be given, as no model tells it.")
    if not config.data.center_crop:
        raise ValueError("`--center_crop` must be given: a random crop would be encoded anew every time.")
    LatentNormalization.from_vae(vae)
    with state.main_process_first():
        images = load_images(config)
    transform = image_transform(config, image_channels(None, vae))
    settings = {**latent_settings(vae, transform), **_settings_of_images(images), "shard_size": shard_size}
    shards = LatentShards(folder, len(images), shard_size)
    with state.main_process_first():
        if state.is_main_process:
            _begin(folder, settings, images, getattr(config.data, "label_column", None))
    missing = [
        number
        for number in range(len(shards))[state.process_index :: state.num_processes]
        if not shards.path(number).exists()
    ]
    _encode(config, vae.to(state.device), images, transform, shards, missing)
    state.wait_for_everyone()
    logger.info(f"{len(images)} images in {len(shards)} shards are in {folder}.")
    return folder


def _encode(
    config: TrainingConfig,
    vae: ModelMixin,
    images: TrainingImages,
    transform: ImageTransform,
    shards: LatentShards,
    numbers: list[int],
) -> None:
    size = config.run.train_batch_size
    parts = [[rows[first : first + size] for first in range(0, len(rows), size)] for rows in map(shards.rows, numbers)]
    batches = encoded(vae, images, transform, [*chain.from_iterable(parts)], config.data.dataloader_num_workers)
    for number, part in zip(numbers, parts, strict=True):
        own = list(islice(batches, len(part)))
        tensors = {name: torch.cat([batch[name] for batch in own]).contiguous() for name in own[0]}
        with replacing(shards.path(number)) as partial:
            save_file(tensors, partial)
    assert next(batches, None) is None


def _begin(folder: Path, settings: dict[str, Any], images: TrainingImages, label_column: str | None) -> None:
    """Write what the shards will be of, or check that those that are there are of the same."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX).exists():
        place = f"`--output_dir`={str(folder)!r}"
        check_index(read_index(folder), settings, place, "Choose another folder, or remove it.")
    replace_text(folder / INDEX, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    for abandoned in folder.glob(f"*.safetensors.*{PARTIAL_SUFFIX}"):  # of a run that was killed
        abandoned.unlink()
    build_folder(folder / IMAGES, lambda partial: _rows(images, label_column).save_to_disk(partial))


def _settings_of_images(images: TrainingImages) -> dict[str, Any]:
    labels = None if images.labels is None else images.labels.tolist()
    captions = None if images.captions is None else images.captions.fingerprint()
    return {
        "num_rows": len(images),
        "images": images.dataset._fingerprint,
        "labels and captions": content_key({"of": [labels, images.id2label, captions]}, [])[:16],
    }


def _rows(images: TrainingImages, label_column: str | None) -> datasets.Dataset:
    """File names, labels and captions, in the columns that they were read from."""
    columns, features = {images.image_column: images.file_names}, {images.image_column: datasets.Value("string")}
    if images.labels is not None:
        names = None if images.id2label is None else list(images.id2label.values())
        if names is None and images.labels.max() + 1 != images.num_classes:
            raise ValueError("`--max_train_samples` must leave in the last class, as the classes have no names.")
        features[label_column] = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
        columns[label_column] = images.labels.tolist()
    rows = datasets.Dataset.from_dict(columns, datasets.Features(features))
    return rows if images.captions is None else datasets.concatenate_datasets([rows, images.captions.rows], axis=1)
