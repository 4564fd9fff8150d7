"""Tiny U-Nets of diffusers. Captions have 5 tokens."""

# ruff: noqa: C408
from __future__ import annotations

import torch
from tiny_shapes import TinyDenoiser, between, noise


UNETS = {
    "I2VGenXLUNet": TinyDenoiser(
        dict(
            sample_size=8, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), block_out_channels=(16, 32), layers_per_block=1,
            norm_num_groups=4, cross_attention_dim=12, attention_head_dim=8,
        ),
        lambda b, g: dict(
            sample=noise(g, b, 4, 3, 8, 8),
            timestep=between(g, b, 0, 999),
            fps=torch.full((b,), 16),
            image_latents=noise(g, b, 4, 3, 8, 8),
            image_embeddings=noise(g, b, 12),
            encoder_hidden_states=noise(g, b, 5, 12),
        ),
    ),
    "Kandinsky3UNet": TinyDenoiser(
        dict(
            time_embedding_dim=32, groups=4, attention_head_dim=8, layers_per_block=2, block_out_channels=(16, 32),
            cross_attention_dim=32, encoder_hid_dim=12,
        ),
        lambda b, g: dict(
            sample=noise(g, b, 4, 8, 8),
            timestep=between(g, b, 0, 999),
            encoder_hidden_states=noise(g, b, 5, 12),
            encoder_attention_mask=torch.ones(b, 5),
        ),
    ),
    "StableCascadeUNet": TinyDenoiser(
        dict(
            in_channels=4, out_channels=4, timestep_ratio_embedding_dim=16, conditioning_dim=16,
            block_out_channels=(16, 32), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1), clip_text_in_channels=12, clip_text_pooled_in_channels=10,
            clip_image_in_channels=8, clip_seq=2, dropout=(0.0, 0.0),
        ),
        lambda b, g: dict(
            sample=noise(g, b, 4, 8, 8),
            timestep_ratio=between(g, b, 0, 1),
            clip_text_pooled=noise(g, b, 1, 10),
            clip_text=noise(g, b, 5, 12),
            clip_img=noise(g, b, 1, 8),
        ),
    ),
    "UNet1DModel": TinyDenoiser(
        dict(
            sample_size=16, in_channels=2, out_channels=2, extra_in_channels=64,
            down_block_types=("DownBlock1DNoSkip", "AttnDownBlock1D"),
            up_block_types=("AttnUpBlock1D", "UpBlock1DNoSkip"), block_out_channels=(32, 32),
        ),
        lambda b, g: dict(sample=noise(g, b, 2, 16), timestep=between(g, b, 0, 1)),
    ),
    "UNet2DConditionModel": TinyDenoiser(
        dict(
            sample_size=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(16, 32), layers_per_block=1,
            norm_num_groups=4, cross_attention_dim=12, attention_head_dim=8,
        ),
        lambda b, g: dict(
            sample=noise(g, b, 4, 8, 8),
            timestep=between(g, b, 0, 999),
            encoder_hidden_states=noise(g, b, 5, 12),
        ),
    ),
    "UNet2DModel": TinyDenoiser(
        dict(
            sample_size=8, in_channels=3, out_channels=3, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), block_out_channels=(16, 32), layers_per_block=1,
            norm_num_groups=4, attention_head_dim=8,
        ),
        lambda b, g: dict(sample=noise(g, b, 3, 8, 8), timestep=between(g, b, 0, 999)),
    ),
    "UNet3DConditionModel": TinyDenoiser(
        dict(
            sample_size=8, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), block_out_channels=(16, 32), layers_per_block=1,
            norm_num_groups=4, cross_attention_dim=12, attention_head_dim=8,
        ),
        lambda b, g: dict(
            sample=noise(g, b, 4, 3, 8, 8),
            timestep=between(g, b, 0, 999),
            encoder_hidden_states=noise(g, b, 5, 12),
        ),
    ),
    "UNetMotionModel": TinyDenoiser(
        dict(
            sample_size=8, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), block_out_channels=(16, 32),
            layers_per_block=1, norm_num_groups=4, cross_attention_dim=12, num_attention_heads=2,
            motion_max_seq_length=4, motion_num_attention_heads=2,
        ),
        lambda b, g: dict(
            sample=noise(g, b, 4, 3, 8, 8),
            timestep=between(g, b, 0, 999),
            encoder_hidden_states=noise(g, b, 5, 12).repeat_interleave(3, dim=0),
        ),
    ),
    "UNetSpatioTemporalConditionModel": TinyDenoiser(
        dict(
            sample_size=8, down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), block_out_channels=(32, 64),
            layers_per_block=1, cross_attention_dim=12, num_attention_heads=(2, 4), addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24, num_frames=3,
        ),
        # Noise levels as in EDM: log(sigma) / 4.
        lambda b, g: dict(
            sample=noise(g, b, 3, 8, 8, 8),
            timestep=between(g, b, -1.55, 1.64),
            encoder_hidden_states=noise(g, b, 1, 12),
            added_time_ids=torch.tensor([[6.0, 127.0, 0.02]] * b),
        ),
    ),
}  # fmt: skip
