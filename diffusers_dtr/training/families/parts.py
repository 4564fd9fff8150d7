"""The family of a text-conditional pipeline, and the denoiser of that family to train."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from diffusers import ModelMixin, SchedulerMixin

from ..components import (
    check_new_denoiser,
    check_pretrained_denoiser,
    default_config,
    denoiser_routing,
    resolve_resolution,
    sample_size,
)
from ..computation import quantization
from ..config import TrainingConfig
from ..data.buckets import resolve_buckets
from ..lora import add_lora
from ..pretrained import pretrained_config, pretrained_options, pretrained_pipeline_class
from .base import DenoiserFamily


def denoiser_family(config: TrainingConfig, families: Mapping[str, type[DenoiserFamily]]) -> DenoiserFamily:
    """The family of the pretrained pipeline; a `ValueError` if it is none of these or a flag does not fit it."""
    name = pretrained_pipeline_class(config.model)
    if name not in families:
        raise ValueError(f"`pretrained_model_name_or_path` must be a pipeline of {', '.join(families)}, got {name}.")
    numbers, options = inspect.signature(families[name]).parameters, config.options
    family = families[name](**{number: options[number] for number in numbers})
    if config.text.max_sequence_length is not None and not family.max_sequence_length:
        raise ValueError(f"`--max_sequence_length` must be left out: the tokenizer of a {name} decides.")
    if config.noise.learn_sigma and not family.takes_variance:
        raise ValueError(f"`--learn_sigma` must be left out: a {name} cannot sample with a predicted variance.")
    scale = config.validation.validation_guidance_scale
    if scale > 1 and not family.guided:
        raise ValueError(
            f"`--validation_guidance_scale` must be 1, got {scale}: a {name} takes no negative prompt. "
            "What its denoiser is told of guidance is `--guidance_scale`."
        )
    return family


def load_family_denoiser(
    config: TrainingConfig,
    family: DenoiserFamily,
    noise_scheduler: SchedulerMixin,
    vae: ModelMixin,
    dtype: torch.dtype = torch.float32,
) -> tuple[TrainingConfig, ModelMixin]:
    """The configuration with resolution and buckets, and the pretrained denoiser or one of a config.

    The pretrained one has adapters if they are asked for, and is then frozen in the precision `dtype`, or quantised. A
    `ValueError` says which size, routing or autoencoder it cannot have.
    """
    new = getattr(config.model, "denoiser_config", None)
    model_class = family.routed_class
    own = pretrained_config(config.model, family.denoiser, model_class) if new is None else new
    config = resolve_resolution(config, vae, model_class, own)
    family.resolution = config.data.resolution
    config = resolve_buckets(config, family, vae, {**default_config(model_class), **own})
    routing = denoiser_routing(config, noise_scheduler if family.counts_timesteps else None, model_class, own)
    if new is not None:
        shape = family.shape(vae, sample_size(config, vae), config.noise.learn_sigma)
        check_new_denoiser(config.model, model_class, shape)
        return config, model_class(**{**new, **shape, **routing})
    model = model_class.from_pretrained(
        config.model.pretrained_model_name_or_path,
        subfolder=family.denoiser,
        # What is trained is in full precision.
        dtype=torch.float32 if config.lora.rank is None else dtype,
        **pretrained_options(config.model),
        **quantization(config.lora.quantize, dtype),
        **({"routing_type": "none"} if config.lora.route_lora else routing),
    )
    check_pretrained_denoiser(config, model, vae, family.packing)
    if config.lora.quantize is not None:
        # In the form that diffusers saves and reads, and that a checkpoint's settings take
        model.register_to_config(quantization_config=model.config.quantization_config.to_dict())
    if config.lora.rank is not None:
        add_lora(model, config.lora, config.routing, family.lora_layers)
    return config, model


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """The precision to load models in that are not trained: that of the run."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
