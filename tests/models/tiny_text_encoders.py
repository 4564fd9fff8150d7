"""Tiny text encoders, tokenizers, VAEs and pipelines of diffusers, with random weights and nothing downloaded."""

from __future__ import annotations

import string

from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from tiny_dit import with_random_weights
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


# Of text embeddings; tests/models/tiny_models.py has models that take them.
WIDTH = 12

_LETTERS = tuple(string.ascii_lowercase)
_CLIP_VOCABULARY = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
_T5_VOCABULARY = ["<pad>", "</s>", "<unk>", "▁", *_LETTERS]


def clip_tokenizer(max_length: int = 16) -> CLIPTokenizer:
    """Spells words letter by letter."""
    vocabulary = {token: index for index, token in enumerate(_CLIP_VOCABULARY)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=max_length)


def clip_text_model(width: int = WIDTH, model_class: type[PreTrainedModel] = CLIPTextModel) -> PreTrainedModel:
    config = CLIPTextConfig(
        hidden_size=width,
        projection_dim=width,
        intermediate_size=8,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=len(_CLIP_VOCABULARY),
        max_position_embeddings=16,
        bos_token_id=_CLIP_VOCABULARY.index("<|startoftext|>"),
        eos_token_id=_CLIP_VOCABULARY.index("<|endoftext|>"),
    )
    return with_random_weights(model_class(config))


# Text encoders and their tokenizers, by their names in pipelines.


def clip(width: int = WIDTH) -> dict:
    return {"text_encoder": clip_text_model(width), "tokenizer": clip_tokenizer()}


def clip_with_projection(width: int = WIDTH, suffix: str = "") -> dict:
    model = clip_text_model(width, CLIPTextModelWithProjection)
    return {f"text_encoder{suffix}": model, f"tokenizer{suffix}": clip_tokenizer()}


def t5(suffix: str = "") -> dict:
    sizes = {"d_model": WIDTH, "d_kv": 6, "d_ff": 8, "num_heads": 2, "num_layers": 1}
    config = T5Config(**sizes, vocab_size=len(_T5_VOCABULARY), dropout_rate=0.0)
    tokenizer = T5Tokenizer(vocab=[(token, -float(index)) for index, token in enumerate(_T5_VOCABULARY)], extra_ids=0)
    return {f"text_encoder{suffix}": with_random_weights(T5EncoderModel(config)), f"tokenizer{suffix}": tokenizer}


def tiny_vae(latent_channels: int = 4) -> AutoencoderKL:
    sizes = {"block_out_channels": (4,), "norm_num_groups": 2, "sample_size": 8}
    return with_random_weights(AutoencoderKL(**sizes, latent_channels=latent_channels, shift_factor=0))


# Side by side, the embeddings of two of half the width are as wide as the denoiser's text.


def stable_diffusion(unet: ModelMixin) -> StableDiffusionPipeline:
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing", steps_offset=1)
    parts = {
        "vae": tiny_vae(),
        "unet": unet,
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
    }
    return StableDiffusionPipeline(**clip(), **parts, requires_safety_checker=False)


def stable_diffusion_xl(unet: ModelMixin) -> StableDiffusionXLPipeline:
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing", steps_offset=1)
    texts = {**clip(WIDTH // 2), **clip_with_projection(WIDTH // 2, "_2")}
    return StableDiffusionXLPipeline(**texts, vae=tiny_vae(), unet=unet, scheduler=scheduler, add_watermarker=False)


def pixart_alpha(transformer: ModelMixin) -> PixArtAlphaPipeline:
    return PixArtAlphaPipeline(
        **t5(), vae=tiny_vae(), transformer=transformer, scheduler=DPMSolverMultistepScheduler()
    )


def stable_diffusion_3(transformer: ModelMixin) -> StableDiffusion3Pipeline:
    texts = {**clip_with_projection(WIDTH // 2), **clip_with_projection(WIDTH // 2, "_2"), **t5("_3")}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(**texts, vae=tiny_vae(), transformer=transformer, scheduler=scheduler)
