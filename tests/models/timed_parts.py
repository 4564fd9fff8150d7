"""What tiny pipelines need beside their denoisers: autoencoders, and what stands where others are not needed."""

# ruff: noqa: C408
from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderOobleck,
    AutoencoderSAME,
)
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder
from timed_pipeline import caption, whole
from tiny_denoisers import inputs


def stand_in(value):
    return lambda *_, **__: value


def tiny_hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    """Whose latents span four frames and eight pixels."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2
    )


def tiny_ltx_2() -> dict:
    """Latents that span eight frames and 32 pixels, sound of 2 channels of 4 frequencies, and one text for both."""
    return dict(
        vae=AutoencoderKLLTX2Video(
            latent_channels=4, block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 3,
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4,
        ),
        audio_vae=AutoencoderKLLTX2Audio(base_channels=8, latent_channels=2, mel_bins=16, num_res_blocks=1),
        connectors=lambda embeddings, mask, padding_side: (embeddings, embeddings, mask),
    )  # fmt: skip


def tiny_oobleck() -> AutoencoderOobleck:
    return AutoencoderOobleck(4, [2, 2], [1, 1], 4, 4, sampling_rate=32)


def stable_audio_3() -> dict:
    vae = AutoencoderSAME(
        patch_size=2, encoder_channels=4, encoder_c_mults=(1,), encoder_strides=(2,), encoder_transformer_depths=(1,),
        latent_dim=4, dim_heads=4, sampling_rate=48,
    )  # fmt: skip
    return dict(vae=vae, duration_embedder=StableAudio3DurationEmbedder(output_dim=12, fourier_dim=8))


def flux_3_call(hidden_states, encoder_hidden_states, timestep, **ids) -> dict:
    return dict(latents=hidden_states, denoiser_input_fields=dict(prompt_embeds=encoder_hidden_states, **ids))


def packed_layout(**_) -> tuple[torch.Tensor, ...]:
    arguments = inputs("Ideogram4Transformer2DModel", batch=1)
    return tuple(arguments[n] for n in ("encoder_hidden_states", "position_ids", "segment_ids", "indicator"))


class OmniGenProcessor:
    """Stands where OmniGen's needs torchvision."""

    max_image_size = 1024

    def __init__(self, *_, **__):
        pass

    def __call__(self, *_, **__) -> dict:
        arguments = inputs("OmniGenTransformer2DModel")
        names = ("input_ids", "attention_mask", "position_ids")
        return {name: arguments[name] for name in names} | {"input_pixel_values": [], "input_image_sizes": {}}


class NoProcessor:
    """Qwen-Image 2.1 asks it how long the beginning of every prompt is, and for the number of a token."""

    tokenizer = SimpleNamespace(encode=lambda text: [0])

    def apply_chat_template(self, *_, **__) -> list[list[int]]:
        return [[]]


class ConditionEncoder:
    """Stands where ACE-Step brings text, lyrics and timbre together."""

    silence_latent = torch.zeros(1, 20, 4)
    null_condition_emb = torch.zeros(1, 1, 12)

    def __call__(self, **_) -> tuple[torch.Tensor, torch.Tensor]:
        return caption(5, 12), whole()


class NoSafetyChecker:
    """Stands where Cosmos refuses to go without."""

    def to(self, *_):
        return self

    def check_text_safety(self, _):
        return True
