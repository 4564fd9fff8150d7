"""From a script's arguments to the clean samples that it trains and validates on: pixels, or a VAE's latents."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from diffusers import ModelMixin
from torch.utils.data import DataLoader, Dataset

from ...latents import encode_images
from ...run_record import LATENTS
from ..components import image_channels, resolve_resolution
from ..config import TrainingConfig, VideoConfig
from ..interruption import ignore_signals
from ..randomness import posterior_generators
from .captions import CaptionedDataset, Captions
from .classes import match_classes
from .images import ImageTransform
from .latent_cache import cache_latents
from .samples import ImageDataset, TrainingBatches
from .training_images import TrainingImages, load_training_images
from .videos import TrainingVideos, VideoTransform, load_training_videos


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """What a model is trained on, and what it is validated with.

    Attributes:
        images: Images or videos, with the names of their classes or their captions.
        dataset: Samples of them, which [`build_loader`] makes batches of.
        held_out: Samples for the held-out loss, or None.
        vae: What encodes the images, frozen; None where pixels are learned.
    """

    images: TrainingImages | TrainingVideos
    dataset: Dataset
    held_out: Dataset | None = None
    vae: ModelMixin | None = None

    @property
    def num_classes(self) -> int | None:
        """Labels are in [0, num_classes); None without labels."""
        return self.images.num_classes


def load_images(config: TrainingConfig) -> TrainingImages:
    """The images that the configuration names, or a draw of them; their columns, labels and captions are checked.

    Labels are read if the data have a `label_column`, captions if the configuration has any.
    """
    data = config.data
    images = load_training_images(
        dataset_name=data.dataset_name,
        dataset_config_name=data.dataset_config_name,
        train_data_dir=data.train_data_dir,
        split=data.train_split,
        image_column=data.image_column,
        label_column=getattr(data, "label_column", None),
        caption_column=config.text and config.text.caption_column,
        cache_dir=config.model.cache_dir,
    )
    return images if data.max_train_samples is None else images.draw(data.max_train_samples, config.run.seed)


def load_data(
    config: TrainingConfig,
    images: TrainingImages | None = None,
    *,
    model: ModelMixin | None = None,
    vae: ModelMixin | None = None,
) -> TrainingData:
    """Samples of pixels, of cached latents or of clips of videos, with captions if there are any.

    Args:
        config: The run's configuration, with a resolution.
        images: What [`load_images`] returned; by default it is called. None for videos.
        model: The denoiser, which tells the size and channels of the images; without it, there are 3 channels.
        vae: Autoencoder in whose latent space the model works, or None.

    Raises:
        ValueError: For `cache_latents` without an autoencoder, or what [`cache_latents`] refuses.
    """
    if isinstance(config.data, VideoConfig):
        return _video_data(config, vae)
    if model is not None:
        config = resolve_resolution(config, vae, type(model), model.config)
    elif config.data.resolution is None:
        raise ValueError("`--resolution` must be given where no model tells it.")
    images = load_images(config) if images is None else images
    channels = 3 if model is None and vae is None else image_channels(model, vae)
    dataset = _captioned(_training_dataset(config, images, channels, vae), images.captions, config)
    held_out = held_out_dataset(config, images, channels)
    if held_out is not None:
        held_out = _captioned(held_out, held_out.images.captions)
    return TrainingData(images, dataset, held_out, vae)


def _video_data(config: TrainingConfig, vae: ModelMixin | None) -> TrainingData:
    data, seed = config.data, config.run.seed
    dataset = _video_dataset(config, data.train_data_dir, data.center_crop, data.random_flip, seed)
    held_out = None
    if data.validation_data_dir is not None:
        held_out = _video_dataset(config, data.validation_data_dir, True, False, seed=0)
        held_out = _captioned(held_out, held_out.images.captions)
    videos = dataset.images
    return TrainingData(videos, _captioned(dataset, videos.captions, config), held_out, vae)


def _training_dataset(
    config: TrainingConfig, images: TrainingImages, channels: int, vae: ModelMixin | None
) -> Dataset:
    data = config.data
    if data.cache_latents and vae is None:
        raise ValueError(
            "`--cache_latents` needs an autoencoder, and the pretrained pipeline has none: leave it out, or give "
            "`--vae_name_or_path`."
        )
    transform = ImageTransform(
        data.resolution, channels, data.center_crop, data.random_flip, data.image_interpolation_mode
    )
    if not data.cache_latents:
        return ImageDataset(images, transform, seed=config.run.seed)
    with PartialState().main_process_first():
        return cache_latents(
            vae.to(PartialState().device),
            images,
            transform,
            Path(config.run.output_dir) / LATENTS,
            seed=config.run.seed,
            batch_size=config.run.train_batch_size,
            num_workers=data.dataloader_num_workers,
        )


def _video_dataset(config: TrainingConfig, folder: str, center_crop: bool, flip: bool, seed: int) -> ImageDataset:
    data = config.data
    videos = load_training_videos(
        folder, config.text.caption_column, data.num_frames, data.frame_stride, config.model.cache_dir
    )
    frames = ImageTransform(data.resolution, 3, center_crop, flip, data.image_interpolation_mode)
    return ImageDataset(videos, VideoTransform(frames, data.num_frames, data.frame_stride), seed=seed)


def _captioned(dataset: Dataset, captions: Captions | None, config: TrainingConfig | None = None) -> Dataset:
    """Samples with their captions, if there are any; of a held-out dataset, without a configuration, the first."""
    if captions is None:
        return dataset
    if config is None:
        return CaptionedDataset(dataset, captions)
    empty = config.text.proportion_empty_prompts
    return CaptionedDataset(dataset, captions, seed=config.run.seed, proportion_empty=empty)


def build_loader(config: TrainingConfig, dataset: Dataset, accelerator: Accelerator, global_step: int) -> DataLoader:
    """Endless batches of this process from an optimizer step on; not to be given to `Accelerator.prepare`."""
    batches = TrainingBatches(
        len(dataset),
        config.run.train_batch_size,
        seed=config.run.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        start_step=global_step * accelerator.gradient_accumulation_steps,
    )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=config.data.dataloader_num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=accelerator.device.type == "cuda",
        # Without a generator of its own, making an iterator would advance the global one.
        generator=torch.Generator(),
    )


def clean_samples(batch: dict[str, Any], vae: ModelMixin | None, seed: int, device: torch.device) -> torch.Tensor:
    """Pixels in [-1, 1] or normalised latents `(batch, channels, ...)` of a batch, on the device."""
    if "latents" in batch:
        return batch["latents"].to(device, non_blocking=True)
    pixel_values = batch["pixel_values"].to(device, non_blocking=True)
    if vae is None:
        return pixel_values
    return encode_images(vae, pixel_values, posterior_generators(seed, batch["epoch"], batch["index"]))


def held_out_dataset(config: TrainingConfig, images: TrainingImages, channels: int) -> ImageDataset | None:
    """The images of the held-out loss, without flips or random crops, the same for every run; or None."""
    data = config.data
    if data.validation_split is None and data.validation_data_dir is None:
        return None
    held_out = load_training_images(
        dataset_name=data.dataset_name if data.validation_data_dir is None else None,
        dataset_config_name=data.dataset_config_name if data.validation_data_dir is None else None,
        train_data_dir=data.validation_data_dir,
        split=data.validation_split or "train",
        image_column=data.image_column,
        label_column=None if images.labels is None else data.label_column,
        min_classes=1,
        caption_column=None if images.captions is None else images.captions.column,
        cache_dir=config.model.cache_dir,
    )
    if images.labels is not None:
        held_out, _ = match_classes(held_out, images.id2label, images.num_classes)
    transform = ImageTransform(data.resolution, channels, True, interpolation=data.image_interpolation_mode)
    return ImageDataset(held_out, transform, seed=0)


def held_out_samples(
    dataset: Dataset, vae: ModelMixin | None, num_images: int, batch_size: int, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor | list]]:
    """Clean samples for the held-out loss, and what else their batch holds.

    Args:
        dataset: What [`held_out_dataset`] returned, or one that adds to its samples.
        vae: Autoencoder, or None.
        num_images: How many samples to take; all if there are fewer.
        batch_size: Images to encode at a time.
        device: Where images are encoded.

    Returns:
        Samples, and the other entries of their batch, such as labels; on the CPU.
    """
    wanted = min(len(dataset), num_images)
    sampler = TrainingBatches(len(dataset), batch_size, seed=0)
    loader = DataLoader(dataset, batch_sampler=sampler, generator=torch.Generator())
    clean, rest = [], {}
    for batch in islice(loader, -(-wanted // batch_size)):
        clean.append(clean_samples(batch, vae, 0, device).cpu())
        for name in batch.keys() - {"pixel_values"}:
            rest.setdefault(name, []).extend(batch[name])
    rest = {
        name: (torch.stack(values) if isinstance(values[0], torch.Tensor) else values)[:wanted]
        for name, values in rest.items()
    }
    return torch.cat(clean)[:wanted], rest
