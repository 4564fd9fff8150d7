"""The families of text-to-image models that can be trained: what is different about each, and what they share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image

from ..latents import decode_latents, vae_scale_factor
from ..models.families import routed_class
from ..models.unet import DTRUNet2DConditionModel
from ..run_folder import TEXT_EMBEDDINGS
from .arguments import noise_config
from .components import pretrained_options, pretrained_pipeline_class
from .text_embeddings import TextEncoder, cache_text_embeddings


class TextEmbedding(NamedTuple):
    """One of the tensors that a pipeline makes of prompts.

    Attributes:
        position: Its place in what the pipeline's `encode_prompt` returns.
        pipeline_argument: The argument of the pipeline that takes it. "negative_" + that takes the one of the
            negative prompts.
        denoiser_argument: The argument of the denoiser that takes it.
    """

    position: int
    pipeline_argument: str
    denoiser_argument: str


@dataclass(frozen=True)
class TextToImageFamily:
    """What is different about one family.

    Attributes:
        routed_class: The denoiser's class.
        embeddings: What its pipelines make of prompts.
        lora_layers: The layers that LoRA adapts unless others are asked for.
        denoiser: What pipelines call the denoiser.
        max_sequence_length: Whether `encode_prompt` takes such an argument, or the tokenizer decides.
        encode_options: Arguments of `encode_prompt` that only this family needs.
        sample_options: Arguments of the pipeline that only this family needs.
        micro_conditions: Whether the denoiser may be told the size of the image.
        takes_variance: Whether the pipeline can sample a denoiser that predicts a variance too.
    """

    routed_class: type[ModelMixin]
    embeddings: tuple[TextEmbedding, ...]
    lora_layers: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    denoiser: str = "transformer"
    max_sequence_length: bool = True
    encode_options: dict[str, Any] = field(default_factory=dict)
    sample_options: dict[str, Any] = field(default_factory=dict)
    micro_conditions: bool = False
    takes_variance: bool = False

    def prompt_options(self, max_sequence_length: int | None) -> dict[str, Any]:
        """The arguments of `encode_prompt` beside the texts, for [`encode`].

        Args:
            max_sequence_length: Tokens of a prompt, or None for the pipeline's own number.

        Raises:
            ValueError: If the number is not to be chosen.
        """
        if max_sequence_length is None:
            return self.encode_options
        if not self.max_sequence_length:
            raise ValueError("`--max_sequence_length` must be left out: the tokenizer of such a pipeline decides.")
        return {**self.encode_options, "max_sequence_length": max_sequence_length}

    @torch.no_grad()
    def encode(
        self, pipeline: DiffusionPipeline, texts: list[str], device: torch.device, options: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """What a pipeline makes of texts: one row per text, by the pipeline's arguments.

        Args:
            pipeline: Of this family, with its text encoders on the device.
            texts: Captions or prompts.
            device: Where they are encoded.
            options: Of [`prompt_options`].
        """
        encoded = pipeline.encode_prompt(
            texts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False, **options
        )
        return {names.pipeline_argument: encoded[names.position] for names in self.embeddings}

    def conditions(self, embeddings: dict[str, torch.Tensor], resolution: int) -> dict[str, Any]:
        """The keyword arguments of the denoiser beside noisy sample and timestep.

        Args:
            embeddings: Of the captions, as [`encode`] returns them.
            resolution: Side of the images in pixels.
        """
        arguments = {names.denoiser_argument: embeddings[names.pipeline_argument] for names in self.embeddings}
        if self.micro_conditions:
            first = embeddings[self.embeddings[0].pipeline_argument]
            size = {
                "resolution": first.new_full((len(first), 2), resolution),
                "aspect_ratio": first.new_ones(len(first), 1),
            }
            arguments["added_cond_kwargs"] = size
        return arguments


_PROMPT = TextEmbedding(0, "prompt_embeds", "encoder_hidden_states")
_PIXART = TextToImageFamily(
    routed_class("PixArtTransformer2DModel"),
    (_PROMPT, TextEmbedding(1, "prompt_attention_mask", "encoder_attention_mask")),
    # Else the images would be of a size that the pipeline prefers.
    sample_options={"use_resolution_binning": False},
    micro_conditions=True,
    takes_variance=True,
)

# By the class of the pipeline. Its name alone: importing the classes would import the models of transformers.
TEXT_TO_IMAGE_FAMILIES = {
    "StableDiffusionPipeline": TextToImageFamily(
        DTRUNet2DConditionModel, (_PROMPT,), denoiser="unet", max_sequence_length=False
    ),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "StableDiffusion3Pipeline": TextToImageFamily(
        routed_class("SD3Transformer2DModel"),
        (_PROMPT, TextEmbedding(2, "pooled_prompt_embeds", "pooled_projections")),
        lora_layers=(
            *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
            *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        ),
        encode_options={"prompt_2": None, "prompt_3": None},
    ),
}


def text_to_image_family(args: argparse.Namespace) -> TextToImageFamily:
    """The family of `--pretrained_model_name_or_path`.

    Args:
        args: Parsed flags.

    Raises:
        ValueError: If its pipeline is of none, or a flag asks for what the family does not have.
    """
    name = pretrained_pipeline_class(
        args.pretrained_model_name_or_path, revision=args.revision, cache_dir=args.cache_dir
    )
    if name not in TEXT_TO_IMAGE_FAMILIES:
        raise ValueError(
            f"`pretrained_model_name_or_path` must be a pipeline of {', '.join(TEXT_TO_IMAGE_FAMILIES)}, got {name}."
        )
    family = TEXT_TO_IMAGE_FAMILIES[name]
    family.prompt_options(args.max_sequence_length)  # refuses a number that is not to be chosen
    if args.learn_sigma and not family.takes_variance:
        raise ValueError(f"`--learn_sigma` must be left out: a {name} cannot sample with a predicted variance.")
    return family


def load_text_to_image_pipeline(
    args: argparse.Namespace,
    family: TextToImageFamily,
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
        ValueError: If the pipeline cannot sample images of `--resolution`.
    """
    # Some pipelines want whole blocks of 8 pixels whatever the autoencoder.
    multiple = math.lcm(8, vae_scale_factor(vae) * model.config.get("patch_size", 1))
    if args.resolution % multiple:
        raise ValueError(f"`--resolution` must be a multiple of {multiple}, got {args.resolution}.")
    pipeline = DiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        **{family.denoiser: model, "vae": vae},
        **pretrained_options(args),
        torch_dtype=dtype,
    )
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **noise_config(args))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_text_encoder(
    args: argparse.Namespace,
    family: TextToImageFamily,
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
    options = family.prompt_options(args.max_sequence_length)

    def encode(some: list[str]) -> dict[str, torch.Tensor]:
        return family.encode(pipeline, some, device, options)

    if not args.cache_text_embeddings:
        return encode
    with accelerator.main_process_first():
        cached = cache_text_embeddings(
            encode,
            set(texts),
            list(tokenizers.values()),
            list(encoders.values()),
            {"pipeline": type(pipeline).__name__, **options},
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


def sampling_arguments(args: argparse.Namespace, family: TextToImageFamily) -> dict[str, Any]:
    """What a pipeline is called with to sample as the flags say, beside prompts and generator.

    Args:
        args: Parsed flags.
        family: The pipeline's family.
    """
    length = args.max_sequence_length
    return {
        "height": args.resolution,
        "width": args.resolution,
        "guidance_scale": args.validation_guidance_scale,
        "num_inference_steps": args.validation_num_inference_steps,
        **({} if length is None else {"max_sequence_length": length}),
        **family.sample_options,
    }


def sample_text_to_image(
    args: argparse.Namespace,
    family: TextToImageFamily,
    pipeline: DiffusionPipeline,
    encode: TextEncoder,
    prompts: list[str],
    generator: torch.Generator,
) -> list[Image.Image]:
    """Images of prompts, at the flags' resolution, guidance and number of steps.

    Args:
        args: Parsed flags.
        family: The pipeline's family.
        pipeline: Holds the denoiser, in eval mode.
        encode: Of [`build_text_encoder`].
        prompts: One per image.
        generator: Draws the noise.
    """
    images = []
    for start in range(0, len(prompts), args.train_batch_size):
        some = prompts[start : start + args.train_batch_size]
        negative = {f"negative_{name}": embeddings for name, embeddings in encode([""] * len(some)).items()}
        latents = pipeline(
            **encode(some),
            **negative,
            **sampling_arguments(args, family),
            negative_prompt=None,
            generator=generator,
            output_type="latent",
        ).images
        # Not by the pipeline, which may have an autoencoder in another precision than its latents.
        with torch.no_grad():
            images += pipeline.image_processor.postprocess(decode_latents(pipeline.vae, latents))
    return images


def _named(pipeline: DiffusionPipeline, beginning: str) -> dict[str, Any]:
    """A pipeline's components whose names begin alike, such as text_encoder, text_encoder_2."""
    components = pipeline.components.items()
    return {name: component for name, component in components if name.startswith(beginning) and component is not None}
