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


def t5_tokenizer() -> T5Tokenizer:
    return T5Tokenizer(vocab=[(token, -float(index)) for index, token in enumerate(_T5_VOCABULARY)], extra_ids=0)


def _clip_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
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


def clip_text_model(width: int = WIDTH) -> CLIPTextModel:
    return with_random_weights(CLIPTextModel(_clip_config(width)))


def clip_text_model_with_projection(width: int = WIDTH) -> CLIPTextModelWithProjection:
    return with_random_weights(CLIPTextModelWithProjection(_clip_config(width)))


def t5_encoder() -> T5EncoderModel:
    config = T5Config(
        d_model=WIDTH, d_kv=6, d_ff=8, num_heads=2, num_layers=1, vocab_size=len(_T5_VOCABULARY), dropout_rate=0.0
    )
    return with_random_weights(T5EncoderModel(config))


def tiny_vae(latent_channels: int = 4) -> AutoencoderKL:
    return with_random_weights(
        AutoencoderKL(
            block_out_channels=(4,), norm_num_groups=2, latent_channels=latent_channels, sample_size=8, shift_factor=0
        )
    )


def stable_diffusion(unet: ModelMixin) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=clip_text_model(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(timestep_spacing="trailing", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(unet: ModelMixin) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        # Side by side, the two are as wide as the U-Net's text.
        text_encoder=clip_text_model(WIDTH // 2),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_model_with_projection(WIDTH // 2),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(timestep_spacing="trailing", steps_offset=1),
        add_watermarker=False,
    )


def pixart_alpha(transformer: ModelMixin) -> PixArtAlphaPipeline:
    return PixArtAlphaPipeline(t5_tokenizer(), t5_encoder(), tiny_vae(), transformer, DPMSolverMultistepScheduler())


def stable_diffusion_3(transformer: ModelMixin) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        # Side by side, the two are as wide as the third.
        text_encoder=clip_text_model_with_projection(WIDTH // 2),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_model_with_projection(WIDTH // 2),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
    )
