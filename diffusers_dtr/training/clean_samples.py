"""From a script's arguments to the clean samples that it trains and validates on: pixels, or a VAE's latents."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch.utils.data import DataLoader, Dataset

from ..latents import encode_images
from ..run_record import LATENTS
from .batches import TrainingBatches
from .classes import match_classes
from .data import TrainingImages, load_training_images
from .images import ImageTransform
from .interruption import ignore_signals
from .latents import cache_latents
from .randomness import posterior_generators
from .samples import ImageDataset, collate_samples


def load_images(
    args: argparse.Namespace, label_column: str | None, caption_column: str | None = None
) -> TrainingImages:
    """The images that the data flags name, or a draw of them; see [`load_training_images`] for what is checked.

    Args:
        args: Parsed flags of [`add_data_arguments`].
        label_column: Column of labels, or None to train without.
        caption_column: Column of captions, or None to train without.
    """
    images = load_training_images(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        split=args.train_split if args.train_data_dir is None else "train",
        image_column=args.image_column,
        label_column=label_column,
        caption_column=caption_column,
        cache_dir=args.cache_dir,
    )
    return images if args.max_train_samples is None else images.draw(args.max_train_samples, args.seed)


def build_dataset(
    args: argparse.Namespace, images: TrainingImages, channels: int, vae: ModelMixin | None, accelerator: Accelerator
) -> Dataset:
    """The training samples as a dataset of pixels, or of cached latents.

    Args:
        args: Parsed flags.
        images: What [`load_images`] returned.
        channels: Channels of the images: 1 or 3.
        vae: Autoencoder of `--cache_latents`, or None.
        accelerator: Its main process encodes, the others wait.

    Raises:
        ValueError: For `--cache_latents` without an autoencoder, or what [`cache_latents`] refuses.
    """
    if args.cache_latents and vae is None:
        raise ValueError(
            "`--cache_latents` needs an autoencoder, and the pretrained pipeline has none: leave it out, or give "
            "`--vae_name_or_path`."
        )
    transform = ImageTransform(
        args.resolution, channels, args.center_crop, args.random_flip, args.image_interpolation_mode
    )
    if not args.cache_latents:
        return ImageDataset(images, transform, seed=args.seed, on_unreadable=args.unreadable_images)
    with accelerator.main_process_first():
        return cache_latents(
            vae,
            images,
            transform,
            Path(args.output_dir) / LATENTS,
            seed=args.seed,
            batch_size=args.train_batch_size,
            num_workers=args.dataloader_num_workers,
            on_unreadable=args.unreadable_images,
        )


def build_loader(args: argparse.Namespace, dataset: Dataset, accelerator: Accelerator, global_step: int) -> DataLoader:
    """Endless batches of this process from an optimizer step on; not to be given to `Accelerator.prepare`.

    Args:
        args: Parsed flags.
        dataset: What [`build_dataset`] returned.
        accelerator: Tells the processes.
        global_step: Optimizer steps already done.
    """
    batches = TrainingBatches(
        len(dataset),
        args.train_batch_size,
        seed=args.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        start_step=global_step * accelerator.gradient_accumulation_steps,
    )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate_samples,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=accelerator.device.type == "cuda",
        # Without a generator of its own, making an iterator would advance the global one.
        generator=torch.Generator(),
    )


def clean_samples(batch: dict[str, Any], vae: ModelMixin | None, seed: int, device: torch.device) -> torch.Tensor:
    """What the denoiser learns to recover from a batch.

    Args:
        batch: Of [`build_loader`].
        vae: Encodes pixels; None where pixels are what is learned, or latents are cached.
        seed: Seed of the run, from which a sample's latent is drawn.
        device: Where the result lies.

    Returns:
        Pixels in [-1, 1] or normalised latents `(batch, channels, height, width)`.
    """
    if "latents" in batch:
        return batch["latents"].to(device, non_blocking=True)
    pixel_values = batch["pixel_values"].to(device, non_blocking=True)
    if vae is None:
        return pixel_values
    return encode_images(vae, pixel_values, posterior_generators(seed, batch["epoch"], batch["index"]))


def held_out_dataset(args: argparse.Namespace, images: TrainingImages, channels: int) -> ImageDataset | None:
    """The images of the held-out loss, without flips or random crops, the same for every run.

    Args:
        args: Parsed flags.
        images: The training images, whose labels these get by the names of their classes; captions come from the same
            column.
        channels: Channels of the images.

    Returns:
        The dataset, or None if no validation data are named.

    Raises:
        ValueError: If they have classes that the training images have not.
    """
    if args.validation_split is None and args.validation_data_dir is None:
        return None
    held_out = load_training_images(
        dataset_name=args.dataset_name if args.validation_data_dir is None else None,
        dataset_config_name=args.dataset_config_name if args.validation_data_dir is None else None,
        train_data_dir=args.validation_data_dir,
        split=args.validation_split or "train",
        image_column=args.image_column,
        label_column=None if images.labels is None else args.label_column,
        min_classes=1,
        caption_column=None if images.captions is None else images.captions.column,
        cache_dir=args.cache_dir,
    )
    if images.labels is not None:
        held_out, _ = match_classes(held_out, images.id2label, images.num_classes)
    transform = ImageTransform(
        args.resolution, channels, center_crop=True, interpolation=args.image_interpolation_mode
    )
    return ImageDataset(held_out, transform, seed=0, on_unreadable=args.unreadable_images)


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
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_samples, generator=torch.Generator())
    clean, rest = [], {}
    for batch in islice(loader, -(-wanted // batch_size)):
        clean.append(clean_samples(batch, vae, 0, device).cpu())
        for name in batch.keys() - {"pixel_values", "unreadable"}:
            rest.setdefault(name, []).extend(batch[name])
    rest = {
        name: (torch.stack(values) if isinstance(values[0], torch.Tensor) else values)[:wanted]
        for name, values in rest.items()
    }
    return torch.cat(clean)[:wanted], rest
