"""Parts of a text-conditional pipeline in training: its family, denoiser, text encoders and samples."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import make_image_grid
from PIL import Image

from ...latents import decode_latents
from ...run_record import TEXT_EMBEDDINGS
from ..components import (
    check_direction,
    check_new_denoiser,
    check_pretrained_denoiser,
    denoiser_routing,
    resolve_resolution,
    sample_size,
)
from ..config import TrainingConfig
from ..data.text_embeddings import TextEncoder, cache_text_embeddings
from ..lora import add_lora
from ..noise_schedule import sampling_scheduler
from ..pretrained import pretrained_config, pretrained_options, pretrained_pipeline_class
from .base import DenoiserFamily, TextRows


def denoiser_family(config: TrainingConfig, families: Mapping[str, type[DenoiserFamily]]) -> DenoiserFamily:
    """The family of the pretrained pipeline; a `ValueError` if it is none of these or a flag does not fit it."""
    name = pretrained_pipeline_class(config.model)
    if name not in families:
        raise ValueError(f"`pretrained_model_name_or_path` must be a pipeline of {', '.join(families)}, got {name}.")
    numbers, options = inspect.signature(families[name]).parameters, config.options
    family = families[name](**{number: options[number] for number in numbers})
    family.check_max_sequence_length(config.text.max_sequence_length)
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
    """The configuration with a resolution, which `family` learns, and the pretrained denoiser or one of a config.

    The pretrained one has adapters if they are asked for, and is then frozen in the precision `dtype`. A `ValueError`
    says which size, routing or autoencoder it cannot have.
    """
    new = getattr(config.model, "denoiser_config", None)
    model_class = family.routed_class
    check_new_denoiser(config.model, model_class, {})
    own = pretrained_config(config.model, family.denoiser, model_class) if new is None else new
    config = resolve_resolution(config, vae, model_class, own)
    family.resolution = config.data.resolution
    check_direction(config.routing, model_class, own)
    routing = denoiser_routing(config, noise_scheduler if family.counts_timesteps else None, own)
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
        **({"routing_type": "none"} if config.lora.route_lora else routing),
    )
    check_pretrained_denoiser(config, model, vae, family.packing)
    if config.lora.rank is not None:
        add_lora(model, config.lora, config.routing, family.lora_layers)
    return config, model


def load_family_pipeline(
    config: TrainingConfig,
    family: DenoiserFamily,
    model: ModelMixin,
    vae: ModelMixin,
    dtype: torch.dtype | None = None,
) -> DiffusionPipeline:
    """The pretrained pipeline with another denoiser and autoencoder, and the noise schedule of the flags.

    Text encoders are loaded in `dtype`: a cast would undo what they keep in float32 themselves, such as T5's `wo`.
    """
    family.check_size(model, vae)
    parts = {family.denoiser: model, "vae": vae, "scheduler": sampling_scheduler(config, latents=True)}
    pipeline = DiffusionPipeline.from_pretrained(
        config.model.pretrained_model_name_or_path, **parts, **pretrained_options(config.model), dtype=dtype
    )
    # Components that a pipeline can do without (the denoiser, in Wan's) are loaded all the same, and not those given.
    pipeline.register_modules(**parts)
    family.check_pipeline(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_text_encoder(
    config: TrainingConfig,
    family: DenoiserFamily,
    pipeline: DiffusionPipeline,
    texts: Iterable[str],
    accelerator: Accelerator,
) -> TextEncoder:
    """What turns texts into embeddings: the frozen text encoders, or in their place a cache of all `texts`."""
    device = accelerator.device
    tokenizers, encoders = _named(pipeline, "tokenizer"), _named(pipeline, "text_encoder")
    for encoder in encoders.values():
        encoder.requires_grad_(False).eval().to(device)
    options = family.prompt_options(pipeline, config.text.max_sequence_length)

    def encode(some: list[str]) -> TextRows:
        return family.encode(pipeline, some, device, options)

    if not config.text.cache_text_embeddings:
        return encode
    with accelerator.main_process_first():
        cached = cache_text_embeddings(
            encode,
            set(texts),
            list(tokenizers.values()),
            list(encoders.values()),
            {"pipeline": type(pipeline).__name__, **_settings(pipeline), **options},
            Path(config.run.output_dir) / TEXT_EMBEDDINGS,
            batch_size=config.run.train_batch_size,
            device=device,
        )
    for name in encoders:
        setattr(pipeline, name, None)
    return cached


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """The precision to load models in that are not trained: that of the run."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def sampling_arguments(config: TrainingConfig, family: DenoiserFamily) -> dict[str, Any]:
    """What a pipeline is called with to sample as the flags say, beside prompts and generator."""
    validation, length = config.validation, config.text.max_sequence_length
    given = {"num_inference_steps": validation.validation_num_inference_steps, "max_sequence_length": length}
    given = {name: value for name, value in given.items() if value is not None}
    return {**family.size(), **family.guidance(validation.validation_guidance_scale), **given, **family.sample_options}


def sample_texts(
    config: TrainingConfig,
    family: DenoiserFamily,
    pipeline: DiffusionPipeline,
    encode: TextEncoder,
    prompts: list[str],
    generator: torch.Generator,
) -> list[Image.Image]:
    """Images of prompts, at the flags' resolution, guidance and number of steps; of videos, strips of their frames."""
    vae, images, size = pipeline.vae, [], config.run.train_batch_size
    for some in (prompts[start : start + size] for start in range(0, len(prompts), size)):
        given = sampling_arguments(config, family) | family.batch(encode(some)) | family.start(pipeline, len(some))
        if config.validation.validation_guidance_scale > 1:
            negative = family.batch(encode([""] * len(some)))
            given |= {f"negative_{name}": embeddings for name, embeddings in negative.items()}
        if "negative_prompt" in inspect.signature(type(pipeline).__call__).parameters:
            given["negative_prompt"] = None  # else some would encode their default beside the embeddings
        latents = pipeline(**given, generator=generator, output_type="latent", return_dict=False)[0]
        # Not by the pipeline, which may have an autoencoder in another precision than its latents.
        with torch.no_grad():
            decoded = decode_latents(vae, family.sampled(pipeline, latents, family.latent_size(vae)))
        images += _images(pipeline, decoded)
    return images


def _images(pipeline: DiffusionPipeline, decoded: torch.Tensor) -> list[Image.Image]:
    if decoded.ndim == 4:
        return pipeline.image_processor.postprocess(decoded)
    videos = pipeline.video_processor.postprocess_video(decoded, "pil")
    return [make_image_grid(frames, rows=1, cols=len(frames)) for frames in videos]


def _settings(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What else a pipeline's own config says of how texts are encoded."""
    config = dict(pipeline.config).items()
    return {name: value for name, value in config if not name.startswith("_") and isinstance(value, bool | int | str)}


def _named(pipeline: DiffusionPipeline, beginning: str) -> dict[str, Any]:
    """A pipeline's components whose names begin alike, such as text_encoder, text_encoder_2."""
    components = pipeline.components.items()
    return {name: component for name, component in components if name.startswith(beginning) and component is not None}
