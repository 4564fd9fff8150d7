"""Autoencoders with random weights, in eval mode."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderTiny,
)


def tiny_vae(**config: Any) -> AutoencoderKL:
    """Whose latents span two pixels."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**{**blocks, "block_out_channels": (4, 8), "norm_num_groups": 2, **config}).eval()


def tiny_taesd() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=0.5,
    ).eval()


def tiny_dc() -> AutoencoderDC:
    torch.manual_seed(0)
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.5,
    ).eval()


# Of video autoencoders with four latent channels.
MEAN, STD = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]


def tiny_qwen_image_vae() -> AutoencoderKLQwenImage:
    torch.manual_seed(0)
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False],
        latents_mean=MEAN,
        latents_std=STD,
    ).eval()


def tiny_wan_vae(halvings: int = 1) -> AutoencoderKLWan:
    """Whose latents span two frames and two pixels, or the next power of two."""
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1] * (halvings + 1),
        num_res_blocks=1,
        temperal_downsample=[True] * halvings,
        latents_mean=MEAN,
        latents_std=STD,
        scale_factor_temporal=2**halvings,
        scale_factor_spatial=2**halvings,
    ).eval()


def tiny_ltx_vae(**config: Any) -> AutoencoderKLLTXVideo:
    """Whose latents span two frames and four pixels."""
    torch.manual_seed(0)
    sizes = {"latent_channels": 4, "block_out_channels": (4, 8), "decoder_block_out_channels": (8, 8)}
    layers = {"layers_per_block": (1,) * 3, "decoder_layers_per_block": (1,) * 3, "decoder_inject_noise": (False,) * 3}
    vae = AutoencoderKLLTXVideo(
        **{**sizes, **layers, **config},
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        downsample_type=("conv",) * 2,
        upsample_residual=(False,) * 2,
        upsample_factor=(1, 1),
        patch_size=2,
    ).eval()
    vae.latents_mean.copy_(torch.tensor(MEAN))
    vae.latents_std.copy_(torch.tensor(STD))
    return vae


def tiny_flux_2_vae() -> AutoencoderKLFlux2:
    """Whose latents span two pixels, and are denoised in patches of 2×2."""
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=8,
    ).eval()
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 3, 16))
    return vae
