"""From a script's arguments to the clean samples that it trains and validates on: pixels, or a VAE's latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from diffusers import ModelMixin
from torch.utils.data import DataLoader, Dataset

from ...latents import encode_images
from ...run_record import LATENTS
from ..components import image_channels, resolve_resolution
from ..config import TrainingConfig, VideoConfig
from ..interruption import ignore_signals
from ..randomness import posterior_generators
from .buckets import AspectRatioBuckets, BucketedBatches, read_sizes
from .captions import CaptionedDataset
from .classes import match_classes
from .encoder_cache import cache_latents
from .images import ImageTransform
from .latent_shards import load_precomputed_images, load_precomputed_latents
from .samples import ImageDataset, TrainingBatches
from .streaming import StreamedBatches, StreamedImages, load_streamed_images
from .training_images import TrainingImages, load_training_images
from .videos import TrainingVideos, VideoTransform, load_training_videos


@dataclass(frozen=True)
class TrainingData:
    """What a model is trained on, and what it is validated with.

    `dataset` has samples of the `images` or videos, which [`build_loader`] makes batches of; `held_out` has those for
    the held-out loss, if any. The `vae`, frozen, encodes them; without it, pixels are learned.
    """

    images: TrainingImages | TrainingVideos
    dataset: Dataset
    held_out: Dataset | None = None
    vae: ModelMixin | None = None

    @property
    def num_images(self) -> int | None:
        """How many images an epoch is of; None of a stream, which does not say."""
        return None if isinstance(self.images, StreamedImages) else len(self.dataset)

    @property
    def num_classes(self) -> int | None:
        """Labels are in [0, num_classes); None without labels."""
        return self.images.num_classes


def load_images(config: TrainingConfig) -> TrainingImages:
    """The images that the configuration names, or a draw of them; their columns, labels and captions are checked.

    Labels are read if the data have a `label_column`, captions if the configuration has any.
    """
    data = config.data
    label, caption = getattr(data, "label_column", None), config.text and config.text.caption_column
    if getattr(data, "latents_dir", None) is not None:
        return load_precomputed_images(data.latents_dir, data.image_column, label, caption)
    if getattr(data, "streaming", False):
        return load_streamed_images(config, data.train_split, label, caption)
    images = _load_images(config, data.train_data_dir, data.train_split, label_column=label, caption_column=caption)
    return images if data.max_train_samples is None else images.draw(data.max_train_samples, config.run.seed)


def _load_images(config: TrainingConfig, folder: str | None, split: str | None, **options: Any) -> TrainingImages:
    """Those of a folder or, without one, of a split of the dataset."""
    data, cache_dir = config.data, config.model.cache_dir
    source = data.dataset_name, data.dataset_config_name, folder, split
    return load_training_images(*source, image_column=data.image_column, cache_dir=cache_dir, **options)


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
        ValueError: For `cache_latents` or `latents_dir` without an autoencoder, or with one that [`cache_latents`] or
            [`load_precomputed_latents`] refuses.
    """
    if isinstance(config.data, VideoConfig):
        dataset = _video_dataset(config, held_out=False)
        held_out = None if config.data.validation_data_dir is None else _video_dataset(config, held_out=True)
    else:
        if model is not None:
            config = resolve_resolution(config, vae, type(model), model.config)
        elif config.data.resolution is None:
            raise ValueError("`--resolution` must be given where no model tells it.")
        images = load_images(config) if images is None else images
        channels = 3 if model is None and vae is None else image_channels(model, vae)
        dataset = _training_dataset(config, images, channels, vae)
        held_out = held_out_dataset(config, images, channels)
    images = dataset.images
    if images.captions is not None:
        dataset = CaptionedDataset(dataset, images.captions, config.run.seed, config.text.proportion_empty_prompts)
        held_out = None if held_out is None else CaptionedDataset(held_out, held_out.images.captions)
    return TrainingData(images, dataset, held_out, vae)


def _training_dataset(
    config: TrainingConfig, images: TrainingImages, channels: int, vae: ModelMixin | None
) -> ImageDataset:
    data, run = config.data, config.run
    flag = "cache_latents" if data.cache_latents else "latents_dir"
    if (data.cache_latents or data.latents_dir is not None) and vae is None:
        raise ValueError(
            f"`--{flag}` needs an autoencoder, and the pretrained pipeline has none: leave it out, or give "
            "`--vae_name_or_path`."
        )
    transform = image_transform(config, channels)
    if data.latents_dir is not None:
        return load_precomputed_latents(data.latents_dir, images, vae, transform, seed=run.seed)
    buckets = _buckets(config, images)
    if not data.cache_latents:
        return ImageDataset(images, transform, seed=run.seed, buckets=buckets)
    state, folder = PartialState(), Path(run.output_dir) / LATENTS
    options = {"batch_size": run.train_batch_size, "num_workers": data.dataloader_num_workers, "buckets": buckets}
    with state.main_process_first():
        return cache_latents(vae.to(state.device), images, transform, folder, seed=run.seed, **options)


def _buckets(config: TrainingConfig, images: TrainingImages) -> AspectRatioBuckets | None:
    sizes = getattr(config.data, "bucket_sizes", None)
    if sizes is None:
        return None
    with PartialState().main_process_first():
        found = read_sizes(images, config.model.cache_dir, config.data.dataloader_num_workers)
    return AspectRatioBuckets.nearest(sizes, found)


def _video_dataset(config: TrainingConfig, *, held_out: bool) -> ImageDataset:
    data = config.data
    folder = data.validation_data_dir if held_out else data.train_data_dir
    clip = data.num_frames, data.frame_stride
    videos = load_training_videos(folder, config.text.caption_column, *clip, config.model.cache_dir)
    return ImageDataset(videos, image_transform(config, 3, held_out), seed=0 if held_out else config.run.seed)


def image_transform(config: TrainingConfig, channels: int, held_out: bool = False) -> ImageTransform:
    """How images or frames become tensors."""
    data = config.data
    crop, flip = held_out or data.center_crop, data.random_flip and not held_out
    frame = data.resolution, channels, crop, flip, data.image_interpolation_mode
    if isinstance(data, VideoConfig):
        return VideoTransform(*frame, data.num_frames, data.frame_stride)
    return ImageTransform(*frame)


def held_out_dataset(config: TrainingConfig, images: TrainingImages, channels: int) -> ImageDataset | None:
    """The images of the held-out loss, without flips or random crops, the same for every run; or None."""
    data = config.data
    if data.validation_split is None and data.validation_data_dir is None:
        return None
    options = {"label_column": None if images.labels is None else data.label_column, "min_classes": 1}
    options["caption_column"] = None if images.captions is None else images.captions.column
    if data.streaming and data.validation_split is not None:
        columns = options["label_column"], options["caption_column"]
        stream = load_streamed_images(config, data.validation_split, *columns)
        held_out = stream.first(config.validation.max_held_out_images)
    else:
        held_out = _load_images(config, data.validation_data_dir, data.validation_split, **options)
    if images.labels is not None:
        held_out, _ = match_classes(held_out, images.id2label, images.num_classes)
    return ImageDataset(held_out, image_transform(config, channels, held_out=True), seed=0)


def build_loader(
    config: TrainingConfig,
    dataset: Dataset,
    accelerator: Accelerator,
    global_step: int,
    stream_states: Sequence[dict[str, Any]] = (),
) -> DataLoader:
    """Endless batches of this process from an optimizer step on; not to be given to `Accelerator.prepare`.

    `stream_states` are what [`stream_states`] returned at that step. A `ValueError` if they are of a stream and there
    is none, or of another number of processes.
    """
    images, processes = getattr(dataset, "images", None), accelerator.num_processes
    streamed = isinstance(images, StreamedImages)
    if global_step and len(stream_states) != (processes if streamed else 0):
        were = f"{len(stream_states)} processes that streamed" if stream_states else "a run without --streaming"
        raise ValueError(
            f"`--streaming` must go on as it was, on as many processes: the checkpoint is of {were}, and this run has "
            f"{processes if streamed else 'none'}."
        )
    options = {
        "seed": config.run.seed,
        "num_processes": processes,
        "process_index": accelerator.process_index,
        "start_step": global_step * accelerator.gradient_accumulation_steps,
    }
    if streamed:
        options["state"] = stream_states[accelerator.process_index] if stream_states else None
        options["ahead"] = 2 * config.data.dataloader_num_workers  # as many batches as torch prefetches
        options["buffer_size"] = config.data.shuffle_buffer_size
        batches = StreamedBatches(images.dataset, config.run.train_batch_size, **options)
    elif getattr(dataset, "buckets", None) is not None:
        micro_batches = processes * accelerator.gradient_accumulation_steps
        options |= {"buckets": dataset.buckets, "micro_batches": micro_batches}
        batches = BucketedBatches(len(dataset), config.run.train_batch_size, **options)
    else:
        batches = TrainingBatches(len(dataset), config.run.train_batch_size, **options)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=config.data.dataloader_num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=accelerator.device.type == "cuda",
        # Without a generator of its own, making an iterator would advance the global one.
        generator=torch.Generator(),
    )


def stream_states(loader: DataLoader, accelerator: Accelerator, global_step: int) -> list[dict[str, Any]]:
    """Where the streams of all processes were at an optimizer step; empty without; all processes must call this."""
    batches = loader.batch_sampler
    if not isinstance(batches, StreamedBatches):
        return []
    return gather_object([batches.state_at(global_step * accelerator.gradient_accumulation_steps)])


def clean_samples(batch: dict[str, Any], vae: ModelMixin | None, seed: int, device: torch.device) -> torch.Tensor:
    """Pixels in [-1, 1] or normalised latents `(batch, channels, ...)` of a batch, on the device."""
    if "latents" in batch:
        return batch["latents"].to(device, non_blocking=True)
    pixel_values = batch["pixel_values"].to(device, non_blocking=True)
    if vae is None:
        return pixel_values
    return encode_images(vae, pixel_values, posterior_generators(seed, batch["epoch"], batch["index"]))


def held_out_samples(
    dataset: Dataset, vae: ModelMixin | None, num_images: int, batch_size: int, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor | list]]:
    """Clean samples for the held-out loss, and what else their batch holds, such as labels; on the CPU.

    The first `num_images` of a dataset as [`held_out_dataset`] returns, or all if there are fewer, `batch_size` at a
    time encoded on the `device`, if there is an autoencoder.
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
