"""Checks of a pipeline's arguments, made before any work."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import unwrap_module

from ..noise_levels import uses_learned_variance


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# What a callback may be given.
CALLBACK_TENSORS = ("latents",)


def check_sampling(
    num_images: int,
    num_inference_steps: int,
    generator: torch.Generator | list[torch.Generator] | None,
    output_type: str,
    max_batch_size: int | None,
    callback_tensors: Sequence[str],
) -> None:
    """Refuse invalid numbers of images and steps, generators, and output names."""
    if num_images < 1:
        raise ValueError(f"`num_images` or `class_labels` must ask for at least one image, got {num_images}.")
    if num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` must be at least 1, got {num_inference_steps}.")
    if isinstance(generator, list) and len(generator) != num_images:
        raise ValueError(f"`generator` must have one generator per image: {num_images}, got {len(generator)}.")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
    if max_batch_size is not None and max_batch_size < 1:
        raise ValueError(f"`max_batch_size` must be at least 1, got {max_batch_size}.")
    unknown = [name for name in callback_tensors if name not in CALLBACK_TENSORS]
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` must be among {CALLBACK_TENSORS}, got {unknown}.")


def check_guidance(
    guidance_scale: float, guidance_interval: tuple[float, float] | None, *, is_labelled: bool, null_class: int | None
) -> None:
    """Refuse guidance without labels, or without a null class to be guided away from."""
    if guidance_scale > 1 and null_class is None:
        raise ValueError(
            f"`guidance_scale` must be 1, got {guidance_scale}: the denoiser has no null class to be guided away "
            "from. Train it with `class_dropout_prob` above 0."
        )
    if guidance_scale > 1 and not is_labelled:
        raise ValueError(
            f"`guidance_scale`={guidance_scale}, which is above 1, needs `class_labels` to guide towards."
        )
    if guidance_interval is not None and (len(guidance_interval) != 2 or guidance_interval[0] > guidance_interval[1]):
        raise ValueError(f"`guidance_interval` must be (low, high) timesteps, low <= high, got {guidance_interval}.")


def size_multiple(model_class: type[ModelMixin], config: Mapping[str, Any]) -> int:
    """What the sides of a denoiser's input must be a multiple of."""
    if issubclass(model_class, UNet2DModel):
        # It halves its input between one level and the next, and must double it again to the same size.
        return 2 ** (len(config["block_out_channels"]) - 1)
    patch_size = config.get("patch_size")
    return patch_size if isinstance(patch_size, int) else 1


def checked_size(
    denoiser: ModelMixin, vae_scale_factor: int, height: int | None, width: int | None
) -> tuple[int, int]:
    """Height and width of the denoiser's input for images of so many pixels; its own size by default."""
    config, denoiser = denoiser.config, unwrap_module(denoiser)
    sample_size = config.sample_size
    sizes = list(sample_size) if isinstance(sample_size, (tuple, list)) else [sample_size, sample_size]
    multiple = vae_scale_factor * size_multiple(type(denoiser), config)
    for axis, (name, pixels) in enumerate((("height", height), ("width", width))):
        if pixels is None and sizes[axis] is None:
            raise ValueError(f"`{name}` must be given: the denoiser's config has no `sample_size`.")
        pixels = sizes[axis] * vae_scale_factor if pixels is None else pixels
        if pixels < 1 or pixels % multiple:
            raise ValueError(f"`{name}` must be a multiple of {multiple}, got {pixels}.")
        sizes[axis] = pixels // vae_scale_factor
    knows_squares_alone = isinstance(denoiser, DiTTransformer2DModel) and not hasattr(denoiser, "routing")
    if knows_squares_alone and sizes[0] != sizes[1]:
        raise ValueError(
            f"`height` and `width` must be equal for {type(denoiser).__name__}, got {height} and {width}. Convert "
            "it with `DTRTransformer2DModel.from_transformer`, which takes rectangular images."
        )
    return sizes[0], sizes[1]


def check_channels(denoiser: ModelMixin, scheduler: SchedulerMixin) -> None:
    """Refuse a denoiser whose output is not the prediction, with a variance that the scheduler uses or drops."""
    config = denoiser.config
    name, variance_type = type(scheduler).__name__, scheduler.config.get("variance_type")
    channels = config.in_channels
    predicted = channels if config.out_channels is None else config.out_channels
    allowed = [2 * channels] if uses_learned_variance(scheduler) else [channels, 2 * channels]
    if predicted not in allowed:
        raise ValueError(
            f"The denoiser must predict {' or '.join(map(str, allowed))} channels, from {channels}, for {name} "
            f"with `variance_type`={variance_type!r}, got {predicted}."
        )


def scheduler_of_chosen_channels(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler, or a copy whose step keeps all of the channels that it is given.

    DPM-Solvers and SASolver drop a learned variance by taking three channels.
    """
    # Others can have the value in their config from the scheduler that theirs was made of, but no such argument.
    if "variance_type" not in inspect.signature(type(scheduler).__init__).parameters:
        return scheduler
    is_learned = scheduler.config.variance_type in ("learned", "learned_range")
    if not is_learned or scheduler.config.prediction_type != "epsilon" or uses_learned_variance(scheduler):
        return scheduler
    return type(scheduler).from_config(scheduler.config, variance_type=None)
