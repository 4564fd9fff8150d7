"""Tiny Wan and the families that came from it. Captions have 5 tokens, videos 3 frames of 2 x 3."""

# ruff: noqa: C408
from __future__ import annotations

import torch
from tiny_shapes import TinyDenoiser, between, noise


WAN = dict(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=16, ffn_dim=48,
    num_layers=2, rope_max_seq_len=16,
)  # fmt: skip

WAN_DENOISERS = {
    "AnyFlowFARTransformer3DModel": TinyDenoiser(
        dict(**WAN, chunk_partition=(1, 2)),
        lambda b, g: dict(
            hidden_states=noise(g, b, 3, 4, 4, 8),
            timestep=between(g, (b, 3), 0, 1000),
            r_timestep=between(g, (b, 3), 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
            chunk_partition=[1, 2],
        ),
    ),
    "AnyFlowTransformer3DModel": TinyDenoiser(
        dict(**WAN),
        lambda b, g: dict(
            hidden_states=noise(g, b, 3, 4, 4, 6),
            timestep=between(g, (b, 3), 0, 1000),
            r_timestep=between(g, (b, 3), 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
        ),
    ),
    "ChronoEditTransformer3DModel": TinyDenoiser(
        dict(**WAN, rope_temporal_skip_len=4),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 3, 4, 6),
            timestep=between(g, b, 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
        ),
    ),
    "HeliosTransformer3DModel": TinyDenoiser(
        dict(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
            ffn_dim=48, num_layers=2, rope_dim=(4, 6, 6),
        ),
        # One frame that is known, then the two that are being made.
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 2, 4, 6),
            timestep=between(g, b, 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
            indices_hidden_states=torch.tensor([[1, 2]] * b),
            indices_latents_history_short=torch.tensor([[0]] * b),
            latents_history_short=noise(g, b, 4, 1, 4, 6),
        ),
    ),
    "SkyReelsV2Transformer3DModel": TinyDenoiser(
        dict(**WAN),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 3, 4, 6),
            timestep=between(g, (b, 3), 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
            enable_diffusion_forcing=True,
        ),
    ),
    "WanAnimateTransformer3DModel": TinyDenoiser(
        dict(
            num_attention_heads=2, attention_head_dim=12, in_channels=12, latent_channels=4, out_channels=4,
            text_dim=12, freq_dim=16, ffn_dim=48, num_layers=2, image_dim=8, rope_max_seq_len=16,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=8,
            motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 12, 3, 4, 6),
            timestep=between(g, b, 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
            encoder_hidden_states_image=noise(g, b, 3, 8),
            pose_hidden_states=noise(g, b, 4, 2, 4, 6),
            face_pixel_values=noise(g, b, 3, 8, 16, 16),
        ),
    ),
    "WanTransformer3DModel": TinyDenoiser(
        dict(**WAN),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 3, 4, 6),
            timestep=between(g, b, 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
        ),
    ),
    "WanVACETransformer3DModel": TinyDenoiser(
        dict(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
            ffn_dim=48, num_layers=3, rope_max_seq_len=16, vace_layers=[0, 2], vace_in_channels=6,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 3, 4, 6),
            timestep=between(g, b, 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
            control_hidden_states=noise(g, b, 6, 3, 4, 6),
        ),
    ),
}  # fmt: skip
