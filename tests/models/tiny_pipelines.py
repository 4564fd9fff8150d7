"""Tiny pipelines of the families that are guided by language models, with random weights and nothing downloaded."""

# ruff: noqa: C408
from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    UniPCMultistepScheduler,
)
from tiny_autoencoders import (
    tiny_dc,
    tiny_flux_2_vae,
    tiny_ltx_vae,
    tiny_qwen_image_vae,
    tiny_vae,
    tiny_wan_vae,
)
from tiny_dit import with_random_weights
from tiny_models import UNET_CONDITION
from tiny_text_encoders import WIDTH, clip, clip_with_projection, t5
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)


# Every language model here, in as few parameters as there can be.
_LANGUAGE = dict(
    vocab_size=300, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=6, pad_token_id=0,
)  # fmt: skip
# Flux.2 takes the tenth, twentieth and thirtieth layer.
_DEEP = {**_LANGUAGE, "num_hidden_layers": 30}
_CHAT = (
    "{% for message in messages %}<{{ message.role }}>{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Spells texts byte by byte."""
    printable = [chr(code) for code in range(33, 127)]
    # How GPT-2 writes a space and a new line.
    tokens = ["<|endoftext|>", *printable, "Ġ", "Ċ"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], chat_template=_CHAT, padding_side="right")


def gemma_tokenizer() -> GemmaTokenizer:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.printable[:94]]
    return GemmaTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])


def gemma() -> dict:
    config = Gemma2Config(**_LANGUAGE, query_pre_attn_scalar=6, sliding_window=64)
    return dict(text_encoder=with_random_weights(Gemma2Model(config)), tokenizer=gemma_tokenizer())


def qwen_3(model_class: type[PreTrainedModel] = Qwen3Model) -> dict:
    model = with_random_weights(model_class(Qwen3Config(**_DEEP)))
    return dict(text_encoder=model, tokenizer=qwen_tokenizer())


def qwen_2_5_vl() -> dict:
    text = {**_LANGUAGE, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 1e4}}
    del text["head_dim"]
    vision = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=WIDTH)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    return dict(text_encoder=with_random_weights(model), tokenizer=qwen_tokenizer())


def mistral_3() -> dict:
    vision = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, head_dim=4)
    config = Mistral3Config(vision_config=PixtralVisionConfig(**vision), text_config=MistralConfig(**_DEEP))
    model = with_random_weights(Mistral3ForConditionalGeneration(config))
    # The processor of Flux.2 needs torchvision, for images that are not used here.
    return dict(text_encoder=model, tokenizer=qwen_tokenizer())


def umt5() -> dict:
    config = UMT5Config(d_model=WIDTH, d_kv=6, d_ff=8, num_heads=2, num_layers=1, vocab_size=40, dropout_rate=0.0)
    return {**t5(), "text_encoder": with_random_weights(UMT5EncoderModel(config))}


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline of one family.

    Attributes:
        pipeline_class: Name of its class.
        denoiser_class: Name of its denoiser's class in diffusers.
        config: Of the denoiser.
        parts: Makes all other components.
        size: Sides of its images.
        options: Arguments of a call that it needs.
        max_sequence_length: Tokens of a prompt, as few as there can be.
    """

    pipeline_class: str
    denoiser_class: str
    config: dict[str, Any]
    parts: Callable[[], dict[str, Any]]
    size: int = 16
    options: dict[str, Any] = field(default_factory=dict)
    max_sequence_length: int | None = 16

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of a call."""
        sizes = dict(height=self.size, width=self.size, max_sequence_length=self.max_sequence_length)
        call = dict(num_inference_steps=2, **{**sizes, **self.options})
        return {name: value for name, value in call.items() if value is not None}

    def plain(self) -> ModelMixin:
        return with_random_weights(getattr(diffusers, self.denoiser_class)(**self.config))

    def pipeline(self, denoiser: ModelMixin | None = None) -> DiffusionPipeline:
        name = "unet" if self.denoiser_class.startswith("UNet") else "transformer"
        parts = {name: self.plain() if denoiser is None else denoiser, **self.parts()}
        pipeline = getattr(diffusers, self.pipeline_class)(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


_HEADS = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1)
_FLUX_2 = dict(
    **_HEADS, in_channels=16, num_single_layers=1, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2),
    joint_attention_dim=3 * WIDTH,
)  # fmt: skip
# Told the sizes of images: six numbers, or five of a refiner, in two channels each, beside the pooled text.
_SDXL = {**UNET_CONDITION.config, "addition_embed_type": "text_time", "addition_time_embed_dim": 2}


def _sdxl(**parts: Any) -> dict:
    return dict(scheduler=EulerDiscreteScheduler(timestep_spacing="trailing"), vae=tiny_vae(), **parts)


def _flow(vae: ModelMixin, shift: float = 3.0, **parts: Any) -> dict:
    return dict(scheduler=FlowMatchEulerDiscreteScheduler(shift=shift), vae=vae, **parts)


def _dynamic(vae: ModelMixin, **parts: Any) -> dict:
    """With a scheduler that has a dynamic shift, as Flux has it."""
    return dict(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae=vae, **parts)


def _multistep(scheduler: type, vae: ModelMixin, **parts: Any) -> dict:
    settings = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return dict(scheduler=scheduler(**settings), vae=vae, **parts)


PIPELINES = {
    "sdxl": TinyPipeline(
        "StableDiffusionXLPipeline", "UNet2DConditionModel",
        {**_SDXL, "projection_class_embeddings_input_dim": WIDTH // 2 + 12},
        # Side by side, the two are as wide as the U-Net's text.
        lambda: _sdxl(**clip(WIDTH // 2), **clip_with_projection(WIDTH // 2, "_2")),
        max_sequence_length=None,
    ),
    "sdxl_refiner": TinyPipeline(
        "StableDiffusionXLImg2ImgPipeline", "UNet2DConditionModel",
        {**_SDXL, "projection_class_embeddings_input_dim": WIDTH + 10},
        lambda: _sdxl(
            text_encoder=None, tokenizer=None, **clip_with_projection(suffix="_2"), requires_aesthetics_score=True
        ),
        options=dict(image=torch.zeros(3, 4, 8, 8), strength=1.0, height=None, width=None),
        max_sequence_length=None,
    ),
    "flux": TinyPipeline(
        "FluxPipeline", "FluxTransformer2DModel",
        dict(
            **_HEADS, num_single_layers=1, in_channels=16, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
            axes_dims_rope=(2, 2, 4), guidance_embeds=True,
        ),
        lambda: _dynamic(tiny_vae(shift_factor=0.1), **clip(), **t5("_2")),
    ),
    "flux_2": TinyPipeline(
        "Flux2Pipeline", "Flux2Transformer2DModel", dict(**_FLUX_2, guidance_embeds=True),
        lambda: _dynamic(tiny_flux_2_vae(), **mistral_3()),
    ),
    "flux_2_klein": TinyPipeline(
        "Flux2KleinPipeline", "Flux2Transformer2DModel", dict(**_FLUX_2, guidance_embeds=False),
        lambda: _dynamic(tiny_flux_2_vae(), **qwen_3(Qwen3ForCausalLM)),
    ),
    "qwen_image": TinyPipeline(
        "QwenImagePipeline", "QwenImageTransformer2DModel",
        dict(**_HEADS, in_channels=16, out_channels=4, joint_attention_dim=WIDTH, axes_dims_rope=(2, 2, 4)),
        lambda: _dynamic(tiny_qwen_image_vae(), **qwen_2_5_vl()),
        max_sequence_length=64,
    ),
    "z_image": TinyPipeline(
        "ZImagePipeline", "ZImageTransformer2DModel",
        dict(
            in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6], axes_lens=[128, 32, 32],
        ),
        lambda: _flow(tiny_vae(shift_factor=0.1), **qwen_3()),
        max_sequence_length=24,
    ),
    "sana": TinyPipeline(
        "SanaPipeline", "SanaTransformer2DModel",
        dict(
            **_HEADS, in_channels=4, out_channels=4, num_cross_attention_heads=2, cross_attention_head_dim=8,
            cross_attention_dim=16, caption_channels=WIDTH, sample_size=16, timestep_scale=0.5,
        ),
        lambda: _multistep(DPMSolverMultistepScheduler, tiny_dc(), **gemma()),
        size=32,
        options=dict(use_resolution_binning=False),
    ),
    "lumina_2": TinyPipeline(
        "Lumina2Pipeline", "Lumina2Transformer2DModel",
        dict(
            sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
            num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 4, 4), axes_lens=(300, 32, 32), cap_feat_dim=WIDTH,
        ),
        # Its pipeline takes every autoencoder's latents to span eight pixels.
        lambda: _flow(
            tiny_vae(
                shift_factor=0.1, block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            ),
            shift=6.0, **gemma(),
        ),
        size=32,
        max_sequence_length=256,
    ),
    "wan": TinyPipeline(
        "WanPipeline", "WanTransformer3DModel",
        dict(**_HEADS, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=8, ffn_dim=8),
        lambda: _multistep(UniPCMultistepScheduler, tiny_wan_vae(), **umt5()),
        options=dict(num_frames=5),
    ),
    "ltx": TinyPipeline(
        "LTXPipeline", "LTXVideoTransformer3DModel",
        dict(**_HEADS, in_channels=4, out_channels=4, cross_attention_dim=16, caption_channels=WIDTH),
        lambda: _dynamic(tiny_ltx_vae(), **t5()),
        size=32,
        options=dict(num_frames=5),
    ),
}  # fmt: skip
