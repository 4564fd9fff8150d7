"""Tiny denoisers of images. Captions have 5 tokens, images 4 x 3 where the family is not bound to squares."""

# ruff: noqa: C408
from __future__ import annotations

import torch
from tiny_shapes import TinyDenoiser, between, lengths_differ, noise, positions


IMAGE_DENOISERS = {
    "AuraFlowTransformer2DModel": TinyDenoiser(
        dict(
            sample_size=8, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=32, pos_embed_max_size=16,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 8, 6),
            encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, b, 0, 1),
        ),
    ),
    "ChromaTransformer2DModel": TinyDenoiser(
        dict(
            in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=12, axes_dims_rope=(4, 4, 8), approximator_num_channels=16,
            approximator_hidden_dim=24, approximator_layers=1,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 12, 8),
            encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, b, 0, 1),
            img_ids=positions(1, 4, 3),
            txt_ids=torch.zeros(5, 3),
        ),
    ),
    "DiTTransformer2DModel": TinyDenoiser(
        dict(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
            num_embeds_ada_norm=10,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 8, 8),
            timestep=between(g, b, 0, 999),
            class_labels=torch.arange(b) % 10,
        ),
    ),
    "FluxTransformer2DModel": TinyDenoiser(
        dict(
            in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 12, 8),
            encoder_hidden_states=noise(g, b, 5, 12),
            pooled_projections=noise(g, b, 10),
            timestep=between(g, b, 0, 1),
            img_ids=positions(1, 4, 3),
            txt_ids=torch.zeros(5, 3),
            guidance=torch.full((b,), 3.5),
        ),
    ),
    "Flux2Transformer2DModel": TinyDenoiser(
        dict(
            in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 12, 8),
            encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, b, 0, 1),
            img_ids=positions(1, 4, 3, 1),
            txt_ids=positions(1, 1, 1, 5),
            guidance=torch.full((b,), 4.0),
        ),
    ),
    "HunyuanDiT2DModel": TinyDenoiser(
        dict(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8, hidden_size=32,
            num_layers=4, cross_attention_dim=12, cross_attention_dim_t5=16, pooled_projection_dim=10, text_len=5,
            text_len_t5=7,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 8, 8),
            timestep=between(g, b, 0, 999),
            encoder_hidden_states=noise(g, b, 5, 12),
            text_embedding_mask=lengths_differ(b, 5).long(),
            encoder_hidden_states_t5=noise(g, b, 7, 16),
            text_embedding_mask_t5=lengths_differ(b, 7).long(),
            image_meta_size=torch.tensor([64.0, 64, 64, 64, 0, 0]).repeat(b, 1),
            style=torch.zeros(b, dtype=torch.long),
            image_rotary_emb=(noise(g, 16, 16).cos(), noise(g, 16, 16).sin()),
        ),
    ),
    "Lumina2Transformer2DModel": TinyDenoiser(
        dict(
            sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
            num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 8), axes_lens=(32, 8, 8), cap_feat_dim=12,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 8, 6),
            timestep=between(g, b, 0, 1),
            encoder_hidden_states=noise(g, b, 5, 12),
            encoder_attention_mask=lengths_differ(b, 5),
        ),
    ),
    "PixArtTransformer2DModel": TinyDenoiser(
        dict(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, cross_attention_dim=32,
            sample_size=8, caption_channels=12,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 8, 6),
            encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, b, 0, 999),
            encoder_attention_mask=lengths_differ(b, 5),
        ),
    ),
    "QwenImageTransformer2DModel": TinyDenoiser(
        dict(
            in_channels=8, out_channels=2, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 12, 8),
            encoder_hidden_states=noise(g, b, 5, 12),
            encoder_hidden_states_mask=lengths_differ(b, 5),
            timestep=between(g, b, 0, 1),
            img_shapes=[[(1, 4, 3)]] * b,
        ),
    ),
    "SD3Transformer2DModel": TinyDenoiser(
        dict(
            sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=12, caption_projection_dim=32, pooled_projection_dim=10, pos_embed_max_size=8,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 8, 6),
            encoder_hidden_states=noise(g, b, 5, 12),
            pooled_projections=noise(g, b, 10),
            timestep=between(g, b, 0, 1000),
        ),
    ),
    "SanaTransformer2DModel": TinyDenoiser(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=12,
            sample_size=4,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 4, 3),
            encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, b, 0, 1000),
            encoder_attention_mask=lengths_differ(b, 5),
        ),
    ),
    "ZImageTransformer2DModel": TinyDenoiser(
        dict(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
            axes_dims=[4, 4, 8], axes_lens=[128, 8, 8],
        ),
        lambda b, g: dict(
            x=list(noise(g, b, 4, 1, 8, 6)),
            t=between(g, b, 0, 1),
            cap_feats=[caption[: 5 + i] for i, caption in enumerate(noise(g, b, 5 + b, 12))],
        ),
    ),
}  # fmt: skip
