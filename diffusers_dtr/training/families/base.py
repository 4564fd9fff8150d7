"""What is common to the families of text-conditional denoisers: what they are told in training and in pipelines."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import DiffusionPipeline, ModelMixin

import diffusers_dtr

from ...latents import latent_channels, vae_scale_factor
from ...routing import DEFAULT_TIMESTEP_RANGE


# From texts to what a pipeline makes of them, by its arguments: one row per text, in a list if rows differ in length.
TextRows = dict[str, torch.Tensor | list[torch.Tensor]]


class TextEmbedding(NamedTuple):
    """One of the tensors that a pipeline's `encode_prompt` returns: its place there, and the arguments that take it.

    `negative_position` is that of the negative prompt, where it is not encoded as a prompt is.
    """

    position: int
    pipeline_argument: str
    denoiser_argument: str
    negative_position: int | None = None


class DenoiserFamily:
    """A family is a subclass that declares what is different about it; an instance knows the numbers of a run.

    Args:
        resolution: Side of the images in pixels.
        guidance_scale: What a guidance-distilled denoiser is told.

    Attributes:
        pipelines: Names of its pipelines' classes.
        denoiser_class: Name of the denoiser's class in diffusers.
        embeddings: What its pipelines make of prompts.
        denoiser: What pipelines call the denoiser.
        lora_layers: The layers that LoRA adapts unless others are asked for.
        max_sequence_length: Whether the number of tokens is chosen, or the tokenizer decides.
        guided: Whether its pipelines can be guided by a negative prompt.
        takes_variance: Whether its pipelines can sample a denoiser that predicts a variance too.
        packing: Side of the squares of latents whose channels become those of a token.
        size_multiple: Its pipelines take images whose sides are multiples of this, whatever the autoencoder.
        sample_options: Arguments of the pipeline that only this family needs.
    """

    pipelines: ClassVar[tuple[str, ...]]
    denoiser_class: ClassVar[str]
    embeddings: ClassVar[tuple[TextEmbedding, ...]]
    denoiser: ClassVar[str] = "transformer"
    lora_layers: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    max_sequence_length: ClassVar[bool] = True
    guided: ClassVar[bool] = True
    takes_variance: ClassVar[bool] = False
    packing: ClassVar[int] = 1
    size_multiple: ClassVar[int] = 8
    sample_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, resolution: int, guidance_scale: float = 3.5):
        self.resolution = resolution
        self.guidance_scale = guidance_scale

    @property
    def routed_class(self) -> type[ModelMixin]:
        """The denoiser's class."""
        return getattr(diffusers_dtr, f"DTR{self.denoiser_class}")

    @property
    def counts_timesteps(self) -> bool:
        """Whether the denoiser is called with a discrete scheduler's timesteps; else its class knows their range."""
        return self.routed_class.family.timestep_range == DEFAULT_TIMESTEP_RANGE

    def token_side(self, model_config: Mapping[str, Any]) -> int:
        """How many latents a token of the denoiser spans along each side."""
        patch = model_config.get("patch_size") or model_config.get("all_patch_size") or 1
        return max(self.packing, patch if isinstance(patch, int) else patch[-1])

    def shape(self, vae: ModelMixin, sample_size: int, learn_sigma: bool) -> dict[str, int]:
        """Those config values of a new denoiser that follow from its latents, as far as the family has them."""
        channels = latent_channels(vae)
        shape = {
            "sample_size": sample_size,
            "in_channels": channels * self.packing**2,
            "out_channels": 2 * channels if learn_sigma else self.out_channels(channels),
        }
        known = inspect.signature(self.routed_class).parameters
        return {name: value for name, value in shape.items() if name in known}

    def out_channels(self, channels: int) -> int:
        """The config value `out_channels` of a denoiser of latents with so many channels."""
        return channels * self.packing**2

    def latent_size(self, vae: ModelMixin) -> tuple[int, ...]:
        """Height and width in latents, of videos frames first."""
        return (self.resolution // vae_scale_factor(vae),) * 2

    def side_multiple(self, model_config: Mapping[str, Any], vae: ModelMixin) -> int:
        """What the sides of images that the pipeline can sample are multiples of."""
        return math.lcm(self.size_multiple, vae_scale_factor(vae) * self.token_side(model_config))

    def check_size(self, model: ModelMixin, vae: ModelMixin) -> None:
        """Refuse a size that the pipeline cannot sample."""
        multiple = self.side_multiple(model.config, vae)
        if self.resolution % multiple:
            raise ValueError(f"`--resolution` must be a multiple of {multiple}, got {self.resolution}.")

    def check_pipeline(self, pipeline: DiffusionPipeline) -> None:
        """Refuse a pipeline of the family that cannot be trained; a `ValueError` says why."""

    # Texts

    def prompt_options(self, pipeline: DiffusionPipeline, max_sequence_length: int | None) -> dict[str, Any]:
        """The arguments of `encode_prompt` beside the texts, as a call of the pipeline gives them."""
        call, encode = (inspect.signature(f).parameters for f in (type(pipeline).__call__, pipeline.encode_prompt))
        # `encode_prompt` has defaults of its own, which no call of the pipeline ever uses.
        shared = [name for name in encode if name in call and call[name].default is not inspect.Parameter.empty]
        options = {name: call[name].default for name in shared if name != "prompt"}
        return options | ({} if max_sequence_length is None else {"max_sequence_length": max_sequence_length})

    @torch.no_grad()
    def encode(
        self, pipeline: DiffusionPipeline, texts: list[str], device: torch.device, options: dict[str, Any]
    ) -> TextRows:
        """What a pipeline makes of texts, by its arguments: one row per text; an empty one is the negative prompt."""
        encoded = self._encode(pipeline, texts, False, device, options)
        rows = {names.pipeline_argument: encoded[names.position] for names in self.embeddings}
        empty = [number for number, text in enumerate(texts) if text == ""]
        if empty and self.embeddings[0].negative_position is not None:
            encoded = self._encode(pipeline, [""], True, device, options)
            for names in self.embeddings:
                own = rows[names.pipeline_argument]
                own[empty] = encoded[names.negative_position].to(own)
        return rows

    @staticmethod
    def _encode(pipeline, texts, guided, device, options) -> tuple:
        given = {"device": device, "do_classifier_free_guidance": guided, **options}
        accepted = inspect.signature(pipeline.encode_prompt).parameters
        # A copy: some pipelines write into the list.
        return pipeline.encode_prompt([*texts], **{name: given[name] for name in given if name in accepted})

    def batch(self, rows: TextRows) -> dict[str, Any]:
        """What [`encode`] returned as the pipeline takes it: padded, where rows differ in length."""
        return rows

    # The denoiser

    def conditions(self, pipeline: DiffusionPipeline, rows: TextRows, batch: dict[str, Any]) -> dict[str, Any]:
        """What the denoiser is told of a batch beside noisy latents and timesteps, by its arguments."""
        text = self.batch(rows)
        return {names.denoiser_argument: text[names.pipeline_argument] for names in self.embeddings}

    def denoise(
        self,
        pipeline: DiffusionPipeline,
        model: ModelMixin,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: dict[str, Any],
    ) -> torch.Tensor:
        """Call the denoiser as its pipeline does; returns the scheduler's `model_output`, unpacked."""
        return model(noisy, timestep=timesteps, **conditions, return_dict=False)[0]

    # Sampling

    def guidance(self, scale: float) -> dict[str, Any]:
        """The pipeline's arguments for classifier-free guidance with a scale, of which 1 is none."""
        return {"guidance_scale": scale}

    def size(self) -> dict[str, Any]:
        """The pipeline's arguments for samples as large as those of training."""
        return {"height": self.resolution, "width": self.resolution}

    def start(self, pipeline: DiffusionPipeline, count: int) -> dict[str, Any]:
        """The pipeline's arguments for what so many samples start from, where that is not noise alone."""
        return {}

    def unpack(self, pipeline: DiffusionPipeline, latents: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        """Latents `(batch, channels, *size)` of a denoiser's output."""
        return latents

    def sampled(self, pipeline: DiffusionPipeline, latents: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        """Normalised latents of what a pipeline returns with `output_type="latent"`."""
        return self.unpack(pipeline, latents, size)
