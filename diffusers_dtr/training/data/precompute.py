"""Latents of images, made ahead of training by several processes, which go on where they were interrupted."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from datasets.utils import tqdm
from diffusers import ModelMixin
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from ...atomic_files import PARTIAL_SUFFIX, replacing
from ...caches import build_folder, content_key
from ...latents import LatentNormalization
from ...run_record import RUN_LOCK, TEXT_EMBEDDINGS
from ..components import image_channels
from ..computation import check_processes
from ..config import TrainingConfig
from .encoder_cache import CachedRows, encoded
from .images import ImageTransform
from .latent_shards import IMAGES, LatentShards, Shards, latent_settings, load_precomputed_images
from .loading import image_transform, load_images
from .text_embeddings import TextEncoding, TextShards, precomputed_texts
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
            of another size, a damaged shard, or another run in it, or the autoencoder does not tell its latents'
            normalisation.
    """
    state, folder = PartialState(), Path(config.run.output_dir)
    check_processes()
    if config.data.resolution is None:
        raise ValueError("`--resolution` must be given, as no model tells it.")
    if not config.data.center_crop:
        raise ValueError("`--center_crop` must be given: a random crop would be encoded anew every time.")
    LatentNormalization.from_vae(vae)
    with state.main_process_first():
        images = load_images(config)
    transform = image_transform(config, image_channels(None, vae))
    settings = {**latent_settings(vae, transform), **_settings_of_images(images)}
    shards = LatentShards(folder, len(images), shard_size)
    with _locked(folder):
        with state.main_process_first():
            if state.is_main_process:
                shards.begin(settings)
                for abandoned in folder.glob(f"*.safetensors.*{PARTIAL_SUFFIX}"):  # of a run that was killed
                    abandoned.unlink()
                rows = _rows(images, getattr(config.data, "label_column", None))
                build_folder(folder / IMAGES, lambda partial: rows.save_to_disk(partial))
        _encode(config, vae.to(state.device), images, transform, shards, _own(shards))
        state.wait_for_everyone()
    logger.info(f"{len(images)} images in {len(shards)} shards are in {folder}.")
    return folder


def precompute_text_embeddings(config: TrainingConfig, encoding: TextEncoding, *, shard_size: int) -> Path:
    """Encodes the captions of a folder of [`precompute_latents`], and the empty one, as it does images.

    The folder within holds one embedding per text, in the text encoders' precision.

    Raises:
        ValueError: If it has embeddings of other captions, text encoders or settings or in shards of another size.
    """
    state, folder = PartialState(), Path(config.run.output_dir)
    images = load_precomputed_images(folder, config.data.image_column, None, config.text.caption_column)
    texts = precomputed_texts(images.captions)
    shards = TextShards(folder / TEXT_EMBEDDINGS, len(texts), shard_size)
    settings, size = encoding.describe(texts), config.run.train_batch_size
    with _locked(folder):
        with state.main_process_first():
            if state.is_main_process:
                shards.begin(settings)
                for abandoned in shards.folder.glob(f".*{PARTIAL_SUFFIX}"):
                    shutil.rmtree(abandoned)
        for number in tqdm(_own(shards), "Encoding captions", unit="shard"):
            some = [texts[row] for row in shards.rows(number)]
            batches = [some[first : first + size] for first in range(0, len(some), size)]
            CachedRows.made_once(shards.path(number), partial(map, encoding.encode, batches))
        state.wait_for_everyone()
    logger.info(f"{len(texts)} texts in {len(shards)} shards are in {shards.folder}.")
    return shards.folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other runs from making shards in a folder, by a lock that the main process has for all of this one."""
    if not PartialState().is_main_process:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / RUN_LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"`--output_dir`={str(folder)!r} is in use by another run: wait for it to end.") from None
    try:
        yield
    finally:
        (folder / RUN_LOCK).unlink(missing_ok=True)
        lock.release()


def _own(shards: Shards) -> list[int]:
    """The shards that this process has to make."""
    state = PartialState()
    own = range(state.process_index, len(shards), state.num_processes)
    return [number for number in shards.missing if number in own]


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


def _settings_of_images(images: TrainingImages) -> dict[str, Any]:
    labels = None if images.labels is None else images.labels.tolist()
    captions = None if images.captions is None else images.captions.fingerprint()
    return {
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
