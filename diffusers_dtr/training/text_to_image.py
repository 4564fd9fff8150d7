"""A family's pipeline in training: its text encoders, and the images that it makes for validation."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import make_image_grid
from PIL import Image

from ..latents import decode_latents
from ..run_record import TEXT_EMBEDDINGS
from .families import DenoiserFamily, TextRows
from .noise_schedule import sampling_scheduler
from .pretrained import pretrained_options, pretrained_pipeline_class
from .text_embeddings import TextEncoder, cache_text_embeddings
from .text_to_image_families import TEXT_TO_IMAGE_FAMILIES


def denoiser_family(args: argparse.Namespace, families: Mapping[str, type[DenoiserFamily]]) -> DenoiserFamily:
    """The family of `--pretrained_model_name_or_path`.

    Args:
        args: Parsed flags.
        families: By the class of the pipeline.

    Raises:
        ValueError: If its pipeline is of none, or a flag asks for what the family does not have.
    """
    name = pretrained_pipeline_class(
        args.pretrained_model_name_or_path, revision=args.revision, cache_dir=args.cache_dir
    )
    if name not in families:
        raise ValueError(f"`pretrained_model_name_or_path` must be a pipeline of {', '.join(families)}, got {name}.")
    numbers = inspect.signature(families[name]).parameters
    family = families[name](**{number: getattr(args, number) for number in numbers})
    family.check_max_sequence_length(args.max_sequence_length)
    if args.learn_sigma and not family.takes_variance:
        raise ValueError(f"`--learn_sigma` must be left out: a {name} cannot sample with a predicted variance.")
    if args.validation_guidance_scale > 1 and not family.guided:
        raise ValueError(
            f"`--validation_guidance_scale` must be 1, got {args.validation_guidance_scale}: a {name} takes no "
            "negative prompt. What its denoiser is told of guidance is `--guidance_scale`."
        )
    return family


def text_to_image_family(args: argparse.Namespace) -> DenoiserFamily:
    """The family of `--pretrained_model_name_or_path`, as [`denoiser_family`] finds it."""
    return denoiser_family(args, TEXT_TO_IMAGE_FAMILIES)


def load_text_to_image_pipeline(
    args: argparse.Namespace,
    family: DenoiserFamily,
    model: ModelMixin,
    vae: ModelMixin,
    dtype: torch.dtype | None = None,
) -> DiffusionPipeline:
    """The pretrained pipeline with another denoiser and autoencoder, and the noise schedule of the flags.

    Args:
        args: Parsed flags.
        family: The pipeline's family.
        model: The denoiser.
        vae: The autoencoder.
        dtype: Precision to load the text encoders in; that in which they were saved by default. Loaded, because a
            cast would undo what they keep in float32 themselves: T5's `wo`, the frequencies of rotary embeddings.

    Raises:
        ValueError: If the pipeline cannot sample images of `--resolution`, or in so many steps, or cannot be trained.
    """
    family.check_size(model, vae)
    parts = {family.denoiser: model, "vae": vae, "scheduler": sampling_scheduler(args, latents=True)}
    pipeline = DiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path, **parts, **pretrained_options(args), dtype=dtype
    )
    # Components that a pipeline can do without (the denoiser, in Wan's) are loaded all the same, and not those given.
    pipeline.register_modules(**parts)
    family.check_pipeline(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_text_encoder(
    args: argparse.Namespace,
    family: DenoiserFamily,
    pipeline: DiffusionPipeline,
    texts: Iterable[str],
    accelerator: Accelerator,
) -> TextEncoder:
    """What turns texts into embeddings on the accelerator's device: the text encoders, or a cache of what they made.

    Args:
        args: Parsed flags.
        family: The pipeline's family.
        pipeline: Its text encoders are frozen and brought to the device, in the precision that they were loaded in.
            With `--cache_text_embeddings` it has none afterwards.
        texts: All that will be asked for, with repetitions or without; gone through only where a cache is made of it.
        accelerator: Its main process encodes, the others wait.
    """
    device = accelerator.device
    tokenizers, encoders = _named(pipeline, "tokenizer"), _named(pipeline, "text_encoder")
    for encoder in encoders.values():
        encoder.requires_grad_(False).eval().to(device)
    options = family.prompt_options(pipeline, args.max_sequence_length)

    def encode(some: list[str]) -> TextRows:
        return family.encode(pipeline, some, device, options)

    if not args.cache_text_embeddings:
        return encode
    with accelerator.main_process_first():
        cached = cache_text_embeddings(
            encode,
            set(texts),
            list(tokenizers.values()),
            list(encoders.values()),
            {"pipeline": type(pipeline).__name__, **_settings(pipeline), **options},
            Path(args.output_dir) / TEXT_EMBEDDINGS,
            batch_size=args.train_batch_size,
            device=device,
        )
    for name in encoders:
        setattr(pipeline, name, None)
    return cached


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """The precision to load models in that are not trained: that of the run.

    Args:
        accelerator: Tells the run's precision.
    """
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def sampling_arguments(args: argparse.Namespace, family: DenoiserFamily) -> dict[str, Any]:
    """What a pipeline is called with to sample as the flags say, beside prompts and generator.

    Args:
        args: Parsed flags.
        family: The pipeline's family.
    """
    length = args.max_sequence_length
    return {
        **family.size(),
        **family.guidance(args.validation_guidance_scale),
        "num_inference_steps": args.validation_num_inference_steps,
        **({} if length is None else {"max_sequence_length": length}),
        **family.sample_options,
    }


def sample_text_to_image(
    args: argparse.Namespace,
    family: DenoiserFamily,
    pipeline: DiffusionPipeline,
    encode: TextEncoder,
    prompts: list[str],
    generator: torch.Generator,
) -> list[Image.Image]:
    """Images of prompts, at the flags' resolution, guidance and number of steps; of videos, strips of their frames.

    Args:
        args: Parsed flags.
        family: The pipeline's family.
        pipeline: Holds the denoiser, in eval mode.
        encode: Of [`build_text_encoder`].
        prompts: One per image.
        generator: Draws the noise.
    """
    vae = pipeline.vae
    images = []
    for start in range(0, len(prompts), args.train_batch_size):
        some = prompts[start : start + args.train_batch_size]
        given = {**sampling_arguments(args, family), **family.batch(encode(some)), **family.start(pipeline, len(some))}
        if args.validation_guidance_scale > 1:
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
