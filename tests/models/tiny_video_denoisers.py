"""Tiny denoisers of video. Captions have 5 tokens, videos 2 or 3 frames of 2 x 3 tokens."""

# ruff: noqa: C408
from __future__ import annotations

import torch
from tiny_shapes import TinyDenoiser, between, lengths_differ, noise


HEADS = dict(attention_head_dim=16, num_attention_heads=2)

VIDEO_DENOISERS = {
    "AllegroTransformer3DModel": TinyDenoiser(
        dict(
            **HEADS, num_layers=2, cross_attention_dim=32, sample_height=4, sample_width=6, sample_frames=2,
            caption_channels=12,
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
            **HEADS, in_channels=4, out_channels=4, time_embed_dim=12, text_embed_dim=12, num_layers=2,
            sample_width=6, sample_height=4, sample_frames=9, max_text_seq_length=5,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 3, 4, 4, 6),
            encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, b, 0, 999),
        ),
    ),
    "ConsisIDTransformer3DModel": TinyDenoiser(
        dict(
            **HEADS, in_channels=4, out_channels=4, time_embed_dim=12, text_embed_dim=12, num_layers=2,
            sample_width=6, sample_height=4, sample_frames=9, max_text_seq_length=5,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 3, 4, 4, 6),
            encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, b, 0, 999),
        ),
    ),
    "Cosmos3OmniTransformer": TinyDenoiser(
        dict(
            head_dim=16, hidden_size=32, intermediate_size=48, latent_channel=4, num_attention_heads=2,
            num_hidden_layers=2, num_key_value_heads=1, patch_latent_dim=16, vocab_size=10, rope_axes_dim=[4, 2, 2],
        ),
        # One sequence: a caption, then the videos, with a timestep for every token of theirs.
        lambda b, g: dict(
            input_ids=torch.randint(10, (5,), generator=g),
            text_indexes=torch.arange(5),
            position_ids=torch.arange(5 + 12 * b).repeat(3, 1),
            und_len=5,
            sequence_length=5 + 12 * b,
            vision_tokens=[noise(g, 1, 4, 2, 4, 6) for _ in range(b)],
            vision_token_shapes=[(2, 2, 3)] * b,
            vision_sequence_indexes=torch.arange(5, 5 + 12 * b),
            vision_mse_loss_indexes=torch.arange(5, 5 + 12 * b),
            vision_timesteps=between(g, b, 0, 1000).repeat_interleave(12),
            vision_noisy_frame_indexes=[torch.arange(2)] * b,
        ),
    ),
    "CosmosTransformer3DModel": TinyDenoiser(
        dict(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, text_embed_dim=12, adaln_lora_dim=6,
            max_size=(4, 8, 8), concat_padding_mask=False,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 2, 4, 6),
            timestep=between(g, b, 0, 1),
            encoder_hidden_states=noise(g, b, 5, 12),
            fps=24,
        ),
    ),
    "EasyAnimateTransformer3DModel": TinyDenoiser(
        dict(
            **HEADS, in_channels=4, out_channels=4, patch_size=2, sample_width=6, sample_height=4, num_layers=2,
            mmdit_layers=2, time_embed_dim=14, text_embed_dim=12,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 2, 4, 6),
            timestep=between(g, b, 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
        ),
    ),
    "HunyuanVideo15Transformer3DModel": TinyDenoiser(
        dict(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, num_refiner_layers=1, text_embed_dim=12,
            text_embed_2_dim=10, image_embed_dim=8, rope_axes_dim=(4, 4, 8),
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 2, 2, 3),
            timestep=between(g, b, 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
            encoder_attention_mask=lengths_differ(b, 5),
            encoder_hidden_states_2=noise(g, b, 3, 10),
            encoder_attention_mask_2=lengths_differ(b, 3),
            image_embeds=torch.zeros(b, 2, 8),
        ),
    ),
    "HunyuanVideoFramepackTransformer3DModel": TinyDenoiser(
        dict(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1,
            text_embed_dim=12, pooled_projection_dim=10, rope_axes_dim=(4, 4, 8), has_image_proj=True,
            image_proj_dim=8, has_clean_x_embedder=True,
        ),
        # One frame that is known, older ones in two resolutions, then the two frames that are being made.
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 2, 8, 8),
            timestep=between(g, b, 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
            encoder_attention_mask=lengths_differ(b, 5),
            pooled_projections=noise(g, b, 10),
            image_embeds=noise(g, b, 3, 8),
            indices_latents=torch.tensor([7, 8]),
            guidance=torch.full((b,), 6000.0),
            latents_clean=noise(g, b, 4, 1, 8, 8),
            indices_latents_clean=torch.tensor([6]),
            latents_history_2x=noise(g, b, 4, 2, 8, 8),
            indices_latents_history_2x=torch.tensor([4, 5]),
            latents_history_4x=noise(g, b, 4, 4, 8, 8),
            indices_latents_history_4x=torch.tensor([0, 1, 2, 3]),
        ),
    ),
    "HunyuanVideoTransformer3DModel": TinyDenoiser(
        dict(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1,
            text_embed_dim=12, pooled_projection_dim=10, rope_axes_dim=(4, 4, 8),
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
    "Kandinsky5Transformer3DModel": TinyDenoiser(
        dict(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=12, in_text_dim2=10, time_dim=14, model_dim=32, ff_dim=48,
            num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 8),
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 2, 4, 6, 4),
            encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, b, 0, 1000),
            pooled_projections=noise(g, b, 10),
            visual_rope_pos=[torch.arange(2), torch.arange(2), torch.arange(3)],
            text_rope_pos=torch.arange(5),
        ),
    ),
    "Kandinsky6SRTransformer3DModel": TinyDenoiser(
        dict(
            in_visual_dim=4, out_visual_dim=4, time_dim=14, model_dim=32, ff_dim=48, num_visual_blocks=2,
            axes_dims=(4, 4, 8),
        ),
        lambda b, g: dict(hidden_states=noise(g, b, 2, 8, 8, 9), timestep=between(g, b, 0, 1000)),
    ),
    "Kandinsky6Transformer3DModel": TinyDenoiser(
        dict(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=12, in_text_dim2=10, time_dim=14, model_dim=32, ff_dim=48,
            num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 8), visual_cond=False, in_audio_dim=6,
            out_audio_dim=6, model_dim_a=24, time_dim_a=14, ff_dim_a=32, axes_dims_a=(4, 4, 4),
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 2, 4, 6, 4),
            encoder_hidden_states=noise(g, b, 5, 12),
            pooled_projections=noise(g, b, 10),
            timestep=between(g, b, 0, 1000),
            audio_hidden_states=noise(g, b, 7, 6),
        ),
    ),
    "LatteTransformer3DModel": TinyDenoiser(
        dict(
            **HEADS, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=32, attention_bias=True,
            sample_size=8, patch_size=2, video_length=3, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
            norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-06, caption_channels=12,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 3, 8, 6),
            timestep=between(g, b, 0, 999),
            encoder_hidden_states=noise(g, b, 5, 12),
        ),
    ),
    "LTX2VideoTransformer3DModel": TinyDenoiser(
        dict(
            **HEADS, in_channels=4, out_channels=4, cross_attention_dim=32, audio_in_channels=6, audio_out_channels=6,
            audio_num_attention_heads=2, audio_attention_head_dim=12, audio_cross_attention_dim=24, num_layers=2,
            caption_channels=12,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 12, 4),
            audio_hidden_states=noise(g, b, 7, 6),
            encoder_hidden_states=noise(g, b, 5, 12),
            audio_encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, b, 0, 1000),
            encoder_attention_mask=lengths_differ(b, 5),
            audio_encoder_attention_mask=lengths_differ(b, 5),
            num_frames=2, height=2, width=3, audio_num_frames=7,
        ),
    ),
    "LTXVideoTransformer3DModel": TinyDenoiser(
        dict(**HEADS, in_channels=4, out_channels=4, cross_attention_dim=32, num_layers=2, caption_channels=12),
        lambda b, g: dict(
            hidden_states=noise(g, b, 12, 4),
            encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, b, 0, 1000),
            encoder_attention_mask=lengths_differ(b, 5),
            num_frames=2, height=2, width=3,
        ),
    ),
    "MiniMaxH3Transformer3DModel": TinyDenoiser(
        dict(
            **HEADS, hidden_size=32, num_layers=2, num_refiner_layers=1, ffn_dim=48, in_channels=2,
            audio_in_channels=6, text_dim=12, freq_dim=16, time_embed_hidden_dim=24, time_embed_dim=20,
            rope_freq_dim=2,
        ),
        # One sequence of a caption, a video and a sound, and one list of timesteps for the whole batch.
        lambda b, g: dict(
            hidden_states=noise(g, b, 12, 8),
            audio_hidden_states=noise(g, b, 7, 6),
            encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, 2, 0, 1),
            timestep_indices=torch.tensor([0] * 17 + [1] * 7),
            token_tags=torch.tensor([0] * 5 + [1] * 12 + [2] * 7),
            position_ids=torch.arange(24.0).repeat(3, 1).T,
            video_indices=torch.arange(5, 17), audio_indices=torch.arange(17, 24), text_indices=torch.arange(5),
        ),
    ),
    "MochiTransformer3DModel": TinyDenoiser(
        dict(
            **HEADS, num_layers=2, pooled_projection_dim=24, in_channels=4, text_embed_dim=16, time_embed_dim=16,
            max_sequence_length=5,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 2, 4, 6),
            encoder_hidden_states=noise(g, b, 5, 16),
            timestep=between(g, b, 0, 1000),
            encoder_attention_mask=lengths_differ(b, 5),
        ),
    ),
    "MotifVideoTransformer3DModel": TinyDenoiser(
        dict(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, num_single_layers=4, num_decoder_layers=2,
            text_embed_dim=12, rope_axes_dim=(4, 4, 8),
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 2, 4, 6),
            timestep=between(g, b, 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
            encoder_attention_mask=lengths_differ(b, 5),
        ),
    ),
    "SanaVideoTransformer3DModel": TinyDenoiser(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=12,
            sample_size=4, rope_max_seq_len=16,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 2, 4, 6),
            encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, b, 0, 1000),
            encoder_attention_mask=lengths_differ(b, 5),
        ),
    ),
    "SanaWMLTX2RefinerTransformer3DModel": TinyDenoiser(
        dict(
            **HEADS, in_channels=4, out_channels=4, cross_attention_dim=32, audio_in_channels=6, audio_out_channels=6,
            audio_num_attention_heads=2, audio_attention_head_dim=12, audio_cross_attention_dim=24, num_layers=2,
            caption_channels=12,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 12, 4),
            encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, (b, 12), 0, 1000),
            video_rotary_emb=(noise(g, b, 12, 32).cos(), noise(g, b, 12, 32).sin()),
            encoder_attention_mask=lengths_differ(b, 5),
        ),
    ),
    "SanaWMTransformer3DModel": TinyDenoiser(
        dict(
            in_channels=4, num_layers=2, hidden_size=32, num_attention_heads=2, softmax_every_n=2, linear_head_dim=16,
            caption_channels=12, chunk_plucker_channels=6, chunk_plucker_post_attn_blocks=2,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 3, 2, 3),
            timestep=between(g, (b, 1, 3), 0, 1000),
            encoder_hidden_states=noise(g, b, 1, 5, 12),
            encoder_attention_mask=lengths_differ(b, 5),
        ),
    ),
}  # fmt: skip
