"""Tiny denoisers of images in latent space. Captions have 5 tokens, images 4 x 3, or 4 x 4 where it must be square."""

# ruff: noqa: C408
from __future__ import annotations

import torch
from tiny_shapes import TinyDenoiser, between, lengths_differ, noise


HEADS = dict(attention_head_dim=16, num_attention_heads=2)


def captioned(b, g):
    return dict(hidden_states=noise(g, b, 4, 8, 6), encoder_hidden_states=noise(g, b, 5, 12))


LATENT_DENOISERS = {
    "AuraFlowTransformer2DModel": TinyDenoiser(
        dict(
            **HEADS, sample_size=8, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2,
            joint_attention_dim=12, caption_projection_dim=32, pos_embed_max_size=16,
        ),
        lambda b, g: dict(
            **captioned(b, g),
            timestep=between(g, b, 0, 1),
        ),
    ),
    "BriaFibo2Transformer2DModel": TinyDenoiser(
        dict(
            in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, cap_feat_dim=12,
            injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=2, max_num_gist_tokens=4,
            gist_step=1, gist_min_text_len=3, gist_max_text_len=8, axes_dims=(4, 4, 8), axes_lens=(32, 8, 8),
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 8, 6),
            timestep=between(g, b, 0, 1),
            encoder_hidden_states=noise(g, b, 2, 5, 12),
            encoder_attention_mask=lengths_differ(b, 5),
        ),
    ),
    "CogView3PlusTransformer2DModel": TinyDenoiser(
        dict(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, text_embed_dim=12, time_embed_dim=14,
            condition_dim=8, pos_embed_max_size=8, sample_size=8,
        ),
        lambda b, g: dict(
            **captioned(b, g),
            timestep=between(g, b, 0, 999),
            **dict.fromkeys(("original_size", "target_size"), torch.tensor([[64.0, 48.0]] * b)),
            crop_coords=torch.zeros(b, 2),
        ),
    ),
    "CogView4Transformer2DModel": TinyDenoiser(
        dict(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, text_embed_dim=12, time_embed_dim=14,
            condition_dim=8, sample_size=8, rope_axes_dim=(8, 8),
        ),
        lambda b, g: dict(
            **captioned(b, g),
            timestep=between(g, b, 0, 1000),
            **dict.fromkeys(("original_size", "target_size"), torch.tensor([[64.0, 48.0]] * b)),
            crop_coords=torch.zeros(b, 2),
        ),
    ),
    "DiTTransformer2DModel": TinyDenoiser(
        dict(**HEADS, in_channels=4, out_channels=8, num_layers=2, sample_size=8, num_embeds_ada_norm=10),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 8, 8),
            timestep=between(g, b, 0, 999),
            class_labels=torch.arange(b) % 10,
        ),
    ),
    "ErnieImageTransformer2DModel": TinyDenoiser(
        dict(
            hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=48, in_channels=4, out_channels=4,
            text_in_dim=12, rope_axes_dim=(4, 4, 8),
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 4, 3),
            timestep=between(g, b, 0, 1000),
            text_bth=noise(g, b, 5, 12),
            text_lens=lengths_differ(b, 5).sum(1),
        ),
    ),
    "GlmImageTransformer2DModel": TinyDenoiser(
        dict(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, text_embed_dim=12, time_embed_dim=14,
            condition_dim=8, prior_vq_quantizer_codebook_size=10,
        ),
        lambda b, g: dict(
            **captioned(b, g),
            prior_token_id=torch.randint(10, (b, 12), generator=g),
            prior_token_drop=torch.zeros(b, 12, dtype=torch.bool),
            timestep=between(g, b, 0, 999),
            target_size=torch.tensor([[64.0, 48.0]] * b),
            crop_coords=torch.zeros(b, 2),
        ),
    ),
    "HiDreamImageTransformer2DModel": TinyDenoiser(
        dict(
            **HEADS, patch_size=2, in_channels=4, num_layers=2, num_single_layers=2, caption_channels=[12, 10],
            text_emb_dim=8, num_routed_experts=4, axes_dims_rope=(4, 4, 8), max_resolution=(8, 8),
            llama_layers=[0, 1, 2, 3],
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 8, 8),
            timesteps=between(g, b, 0, 1000),
            encoder_hidden_states_t5=noise(g, b, 5, 12),
            encoder_hidden_states_llama3=noise(g, 4, b, 5, 10),
            pooled_embeds=noise(g, b, 8),
        ),
    ),
    "HunyuanDiT2DModel": TinyDenoiser(
        dict(
            **HEADS, in_channels=4, patch_size=2, sample_size=8, hidden_size=32, num_layers=4, cross_attention_dim=12,
            cross_attention_dim_t5=16, pooled_projection_dim=10, text_len=5, text_len_t5=7,
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
    "HunyuanImageTransformer2DModel": TinyDenoiser(
        dict(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1,
            text_embed_dim=12, text_embed_2_dim=10, rope_axes_dim=(8, 8),
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 4, 3),
            timestep=between(g, b, 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
            encoder_attention_mask=lengths_differ(b, 5),
            encoder_hidden_states_2=noise(g, b, 3, 10),
            encoder_attention_mask_2=lengths_differ(b, 3),
        ),
    ),
    "JoyImageEditTransformer3DModel": TinyDenoiser(
        dict(
            in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=12, num_layers=2, rope_dim_list=[4, 4, 8],
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 1, 8, 6),
            timestep=between(g, b, 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
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
    "LuminaNextDiT2DModel": TinyDenoiser(
        dict(
            sample_size=8, hidden_size=32, num_layers=2, num_attention_heads=2, num_kv_heads=1, multiple_of=8,
            cross_attention_dim=12,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 8, 6),
            timestep=between(g, b, 0, 1),
            encoder_hidden_states=noise(g, b, 5, 12),
            encoder_mask=lengths_differ(b, 5).long(),
            image_rotary_emb=torch.polar(torch.ones(8, 8, 8), noise(g, 8, 8, 8)),
            cross_attention_kwargs={},
        ),
    ),
    "OmniGenTransformer2DModel": TinyDenoiser(
        dict(
            hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48, num_layers=2,
            pad_token_id=0, vocab_size=10, max_position_embeddings=64, original_max_position_embeddings=32,
            rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}, pos_embed_max_size=8,
            time_step_dim=16,
        ),
        # [caption, timestep, image]
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 8, 6),
            timestep=between(g, b, 0, 1),
            input_ids=torch.randint(10, (b, 5), generator=g),
            input_img_latents=[],
            input_image_sizes={},
            attention_mask=torch.ones(b, 18, 18),
            position_ids=torch.arange(18).repeat(b, 1),
        ),
    ),
    "PixArtTransformer2DModel": TinyDenoiser(
        dict(**HEADS, in_channels=4, num_layers=2, cross_attention_dim=32, sample_size=8, caption_channels=12),
        lambda b, g: dict(
            **captioned(b, g),
            timestep=between(g, b, 0, 999),
            encoder_attention_mask=lengths_differ(b, 5),
        ),
    ),
    "PriorTransformer": TinyDenoiser(
        dict(**HEADS, num_layers=2, embedding_dim=12, num_embeddings=5),
        lambda b, g: dict(
            hidden_states=noise(g, b, 12),
            timestep=between(g, b, 0, 999),
            proj_embedding=noise(g, b, 12),
            encoder_hidden_states=noise(g, b, 5, 12),
            attention_mask=lengths_differ(b, 5),
        ),
    ),
    "PRXTransformer2DModel": TinyDenoiser(
        dict(in_channels=4, context_in_dim=12, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8]),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 8, 6),
            timestep=between(g, b, 0, 1),
            encoder_hidden_states=noise(g, b, 5, 12),
            attention_mask=lengths_differ(b, 5),
        ),
    ),
    "SanaTransformer2DModel": TinyDenoiser(
        dict(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2,
            cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=12, sample_size=4,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 4, 3),
            encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, b, 0, 1000),
            encoder_attention_mask=lengths_differ(b, 5),
        ),
    ),
    "SD3Transformer2DModel": TinyDenoiser(
        dict(
            **HEADS, sample_size=8, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=12,
            caption_projection_dim=32, pooled_projection_dim=10, pos_embed_max_size=8, dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        lambda b, g: dict(
            **captioned(b, g),
            pooled_projections=noise(g, b, 10),
            timestep=between(g, b, 0, 1000),
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
