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
    "AnyFlowTransformer3DModel": TinyDenoiser(
        dict(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
            ffn_dim=48, num_layers=2, rope_max_seq_len=16,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 3, 4, 4, 6),
            timestep=between(g, (b, 3), 0, 1000),
            r_timestep=between(g, (b, 3), 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
        ),
    ),
    "ChronoEditTransformer3DModel": TinyDenoiser(
        dict(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
            ffn_dim=48, num_layers=2, rope_max_seq_len=16, rope_temporal_skip_len=4,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 3, 4, 6),
            timestep=between(g, b, 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
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
    "ConsisIDTransformer3DModel": TinyDenoiser(
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
    "CosmosTransformer3DModel": TinyDenoiser(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, text_embed_dim=12,
            adaln_lora_dim=6, max_size=(4, 8, 8), concat_padding_mask=False,
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
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, sample_width=6,
            sample_height=4, num_layers=2, mmdit_layers=2, time_embed_dim=14, text_embed_dim=12,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 2, 4, 6),
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
    "HunyuanVideo15Transformer3DModel": TinyDenoiser(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_refiner_layers=1, text_embed_dim=12, text_embed_2_dim=10, image_embed_dim=8, rope_axes_dim=(4, 4, 8),
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
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_single_layers=2, num_refiner_layers=1, text_embed_dim=12, pooled_projection_dim=10,
            rope_axes_dim=(4, 4, 8), has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True,
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
    "LTX2VideoTransformer3DModel": TinyDenoiser(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
            audio_in_channels=6, audio_out_channels=6, audio_num_attention_heads=2, audio_attention_head_dim=12,
            audio_cross_attention_dim=24, num_layers=2, caption_channels=12,
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
    "MotifVideoTransformer3DModel": TinyDenoiser(
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_single_layers=4, num_decoder_layers=2, text_embed_dim=12, rope_axes_dim=(4, 4, 8),
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
    "SkyReelsV2Transformer3DModel": TinyDenoiser(
        dict(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
            ffn_dim=48, num_layers=2, rope_max_seq_len=16,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 3, 4, 6),
            timestep=between(g, (b, 3), 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
            enable_diffusion_forcing=True,
        ),
    ),
    "WanAnimateTransformer3DModel": TinyDenoiser(
        dict(
            num_attention_heads=2, attention_head_dim=12, in_channels=12, latent_channels=4, out_channels=4, text_dim=12,
            freq_dim=16, ffn_dim=48, num_layers=2, image_dim=8, rope_max_seq_len=16,
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
