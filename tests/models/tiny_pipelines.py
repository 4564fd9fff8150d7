"""Tiny pipelines of the families that are guided by language models, with random weights and nothing downloaded."""

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
from tiny_text_encoders import (
    WIDTH,
    clip_text_model,
    clip_text_model_with_projection,
    clip_tokenizer,
    t5_encoder,
    t5_tokenizer,
)
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
_LANGUAGE = {
    "vocab_size": 300,
    "hidden_size": WIDTH,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "pad_token_id": 0,
}
# Flux.2 takes the tenth, twentieth and thirtieth layer.
_DEEP = {**_LANGUAGE, "num_hidden_layers": 30}
_VISION = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
_CHAT = (
    "{% for message in messages %}<{{ message.role }}>{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Spells texts byte by byte."""
    printable = [chr(code) for code in range(33, 127)]
    # How GPT-2 writes a space and a new line.
    tokens = ["<|endoftext|>", *printable, "Ġ", "Ċ"]
    return Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        chat_template=_CHAT,
        padding_side="right",
    )


def gemma_tokenizer() -> GemmaTokenizer:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.printable[:94]]
    return GemmaTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])


def _built(model_class: type[PreTrainedModel], config) -> PreTrainedModel:
    return with_random_weights(model_class(config))


def gemma() -> Gemma2Model:
    return _built(Gemma2Model, Gemma2Config(**_LANGUAGE, query_pre_attn_scalar=6, sliding_window=64))


def qwen_3(model_class: type[PreTrainedModel] = Qwen3Model) -> PreTrainedModel:
    return _built(model_class, Qwen3Config(**_DEEP))


def qwen_2_5_vl() -> Qwen2_5_VLForConditionalGeneration:
    text = {**_LANGUAGE, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 1e4}}
    text = {name: value for name, value in text.items() if name != "head_dim"}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": WIDTH}
    return _built(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def mistral_3() -> Mistral3ForConditionalGeneration:
    text, vision = MistralConfig(**_DEEP), PixtralVisionConfig(**_VISION, num_hidden_layers=1, head_dim=4)
    return _built(Mistral3ForConditionalGeneration, Mistral3Config(vision_config=vision, text_config=text))


def umt5_encoder() -> UMT5EncoderModel:
    config = UMT5Config(d_model=WIDTH, d_kv=6, d_ff=8, num_heads=2, num_layers=1, vocab_size=40, dropout_rate=0.0)
    return _built(UMT5EncoderModel, config)


def _flow(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**config)


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
    size: int
    options: dict[str, Any] = field(default_factory=dict)
    max_sequence_length: int | None = 16

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of a call."""
        length = {} if self.max_sequence_length is None else {"max_sequence_length": self.max_sequence_length}
        call = {"height": self.size, "width": self.size, "num_inference_steps": 2, **length, **self.options}
        return {name: value for name, value in call.items() if value is not None}

    def plain(self) -> ModelMixin:
        return with_random_weights(getattr(diffusers, self.denoiser_class)(**self.config))

    def pipeline(self, denoiser: ModelMixin | None = None) -> DiffusionPipeline:
        name = "unet" if self.denoiser_class.startswith("UNet") else "transformer"
        parts = {name: self.plain() if denoiser is None else denoiser, **self.parts()}
        pipeline = getattr(diffusers, self.pipeline_class)(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_FLUX_2 = {
    **_HEADS,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "timestep_guidance_channels": 8,
    "axes_dims_rope": (2, 2, 2, 2),
}
# A scheduler with a dynamic shift, as Flux has it.
_DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True}

# Told the sizes of images: six numbers, or five of a refiner, in two channels each, beside the pooled text.
_SDXL = {**UNET_CONDITION.config, "addition_embed_type": "text_time", "addition_time_embed_dim": 2}

PIPELINES = {
    "sdxl": TinyPipeline(
        "StableDiffusionXLPipeline",
        "UNet2DConditionModel",
        {**_SDXL, "projection_class_embeddings_input_dim": WIDTH // 2 + 12},
        lambda: {
            "scheduler": EulerDiscreteScheduler(timestep_spacing="trailing"),
            "vae": tiny_vae(),
            # Side by side, the two are as wide as the U-Net's text.
            "text_encoder": clip_text_model(WIDTH // 2),
            "tokenizer": clip_tokenizer(),
            "text_encoder_2": clip_text_model_with_projection(WIDTH // 2),
            "tokenizer_2": clip_tokenizer(),
        },
        size=16,
        max_sequence_length=None,
    ),
    "sdxl_refiner": TinyPipeline(
        "StableDiffusionXLImg2ImgPipeline",
        "UNet2DConditionModel",
        {**_SDXL, "projection_class_embeddings_input_dim": WIDTH + 10},
        lambda: {
            "scheduler": EulerDiscreteScheduler(timestep_spacing="trailing"),
            "vae": tiny_vae(),
            "text_encoder": None,
            "tokenizer": None,
            "text_encoder_2": clip_text_model_with_projection(),
            "tokenizer_2": clip_tokenizer(),
            "requires_aesthetics_score": True,
        },
        size=16,
        max_sequence_length=None,
        options={"image": torch.zeros(3, 4, 8, 8), "strength": 1.0, "height": None, "width": None},
    ),
    "flux": TinyPipeline(
        "FluxPipeline",
        "FluxTransformer2DModel",
        {
            **_HEADS,
            "num_layers": 1,
            "num_single_layers": 1,
            "in_channels": 16,
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
            "axes_dims_rope": (2, 2, 4),
            "guidance_embeds": True,
        },
        lambda: {
            "scheduler": _flow(**_DYNAMIC),
            "vae": tiny_vae(shift_factor=0.1),
            "text_encoder": clip_text_model(),
            "tokenizer": clip_tokenizer(),
            "text_encoder_2": t5_encoder(),
            "tokenizer_2": t5_tokenizer(),
        },
        size=16,
    ),
    "flux_2": TinyPipeline(
        "Flux2Pipeline",
        "Flux2Transformer2DModel",
        {**_FLUX_2, "joint_attention_dim": 3 * WIDTH, "guidance_embeds": True},
        lambda: {
            "scheduler": _flow(**_DYNAMIC),
            "vae": tiny_flux_2_vae(),
            "text_encoder": mistral_3(),
            # The processor of Flux.2 needs torchvision, for images that are not used here.
            "tokenizer": qwen_tokenizer(),
        },
        size=16,
    ),
    "flux_2_klein": TinyPipeline(
        "Flux2KleinPipeline",
        "Flux2Transformer2DModel",
        {**_FLUX_2, "joint_attention_dim": 3 * WIDTH, "guidance_embeds": False},
        lambda: {
            "scheduler": _flow(**_DYNAMIC),
            "vae": tiny_flux_2_vae(),
            "text_encoder": qwen_3(Qwen3ForCausalLM),
            "tokenizer": qwen_tokenizer(),
        },
        size=16,
    ),
    "qwen_image": TinyPipeline(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 1,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": (2, 2, 4),
        },
        lambda: {
            "scheduler": _flow(**_DYNAMIC),
            "vae": tiny_qwen_image_vae(),
            "text_encoder": qwen_2_5_vl(),
            "tokenizer": qwen_tokenizer(),
        },
        size=16,
        max_sequence_length=64,
    ),
    "z_image": TinyPipeline(
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": WIDTH,
            "axes_dims": [4, 6, 6],
            "axes_lens": [128, 32, 32],
        },
        lambda: {
            "scheduler": _flow(shift=3.0),
            "vae": tiny_vae(shift_factor=0.1),
            "text_encoder": qwen_3(),
            "tokenizer": qwen_tokenizer(),
        },
        size=16,
        max_sequence_length=24,
    ),
    "sana": TinyPipeline(
        "SanaPipeline",
        "SanaTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": WIDTH,
            "sample_size": 16,
            "timestep_scale": 0.5,
        },
        lambda: {
            "scheduler": DPMSolverMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
            ),
            "vae": tiny_dc(),
            "text_encoder": gemma(),
            "tokenizer": gemma_tokenizer(),
        },
        size=32,
        options={"use_resolution_binning": False},
    ),
    "lumina_2": TinyPipeline(
        "Lumina2Pipeline",
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (300, 32, 32),
            "cap_feat_dim": WIDTH,
        },
        lambda: {
            "scheduler": _flow(shift=6.0),
            # Its pipeline takes every autoencoder's latents to span eight pixels.
            "vae": tiny_vae(
                shift_factor=0.1,
                block_out_channels=(4,) * 4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            ),
            "text_encoder": gemma(),
            "tokenizer": gemma_tokenizer(),
        },
        size=32,
        max_sequence_length=256,
    ),
    "wan": TinyPipeline(
        "WanPipeline",
        "WanTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": WIDTH,
            "freq_dim": 8,
            "ffn_dim": 8,
            "num_layers": 1,
        },
        lambda: {
            "scheduler": UniPCMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
            ),
            "vae": tiny_wan_vae(),
            "text_encoder": umt5_encoder(),
            "tokenizer": t5_tokenizer(),
        },
        size=16,
        options={"num_frames": 5},
    ),
    "ltx": TinyPipeline(
        "LTXPipeline",
        "LTXVideoTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "num_layers": 1,
            "caption_channels": WIDTH,
        },
        lambda: {
            "scheduler": _flow(**_DYNAMIC),
            "vae": tiny_ltx_vae(),
            "text_encoder": t5_encoder(),
            "tokenizer": t5_tokenizer(),
        },
        size=32,
        options={"num_frames": 5},
    ),
}
