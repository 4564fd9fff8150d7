"""Tiny denoisers of video. Captions have 5 tokens, videos 2 or 3 frames of 2 x 3 tokens."""

# ruff: noqa: C408
from __future__ import annotations

import torch
from tiny_shapes import TinyDenoiser, between, lengths_differ, noise


VIDEO_DENOISERS = {
    "AllegroTransformer3DModel": TinyDenoiser(
        dict(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, cross_attention_dim=32, sample_height=4,
            sample_width=6, sample_frames=2, caption_channels=12,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 2, 4, 6),
            encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, b, 0, 999),
            encoder_attention_mask=lengths_differ(b, 5),
        ),
    ),
    "CogVideoXTransformer3DModel": TinyDenoiser(
        dict(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=12,
            text_embed_dim=12, num_layers=2, sample_width=6, sample_height=4, sample_frames=9, max_text_seq_length=5,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 3, 4, 4, 6),
            encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, b, 0, 999),
        ),
    ),
    "HunyuanVideoTransformer3DModel": TinyDenoiser(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_single_layers=2, num_refiner_layers=1, text_embed_dim=12, pooled_projection_dim=10,
            rope_axes_dim=(4, 4, 8),
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 2, 4, 6),
            timestep=between(g, b, 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
            encoder_attention_mask=lengths_differ(b, 5),
            pooled_projections=noise(g, b, 10),
            guidance=torch.full((b,), 6000.0),
        ),
    ),
    "LTXVideoTransformer3DModel": TinyDenoiser(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
            num_layers=2, caption_channels=12,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 12, 4),
            encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, b, 0, 1000),
            encoder_attention_mask=lengths_differ(b, 5),
            num_frames=2, height=2, width=3,
        ),
    ),
    "LatteTransformer3DModel": TinyDenoiser(
        dict(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
            cross_attention_dim=32, attention_bias=True, sample_size=8, patch_size=2, video_length=3,
            activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
            norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=12,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 3, 8, 6),
            timestep=between(g, b, 0, 999),
            encoder_hidden_states=noise(g, b, 5, 12),
        ),
    ),
    "MochiTransformer3DModel": TinyDenoiser(
        dict(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, pooled_projection_dim=24, in_channels=4,
            text_embed_dim=16, time_embed_dim=16, max_sequence_length=5,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 2, 4, 6),
            encoder_hidden_states=noise(g, b, 5, 16),
            timestep=between(g, b, 0, 1000),
            encoder_attention_mask=lengths_differ(b, 5),
        ),
    ),
    "WanTransformer3DModel": TinyDenoiser(
        dict(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
            ffn_dim=48, num_layers=2, rope_max_seq_len=16,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 3, 4, 6),
            timestep=between(g, b, 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
        ),
    ),
}  # fmt: skip
