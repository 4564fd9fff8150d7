"""Tiny denoisers of sound. Captions have 5 tokens, sounds 12."""

# ruff: noqa: C408
from __future__ import annotations

import torch
from tiny_shapes import TinyDenoiser, between, lengths_differ, noise


SOUND_DENOISERS = {
    "AceStepTransformer1DModel": TinyDenoiser(
        dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=4, encoder_hidden_size=10,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 12, 4),
            timestep=(timestep := between(g, b, 0, 1)),
            timestep_r=timestep,
            encoder_hidden_states=noise(g, b, 5, 10),
            context_latents=noise(g, b, 12, 8),
        ),
    ),
    "LongCatAudioDiTTransformer": TinyDenoiser(
        dict(dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=12, latent_dim=4),
        lambda b, g: dict(
            hidden_states=noise(g, b, 12, 4),
            encoder_hidden_states=noise(g, b, 5, 12),
            encoder_attention_mask=lengths_differ(b, 5),
            timestep=between(g, b, 0, 1),
            attention_mask=torch.ones(b, 12, dtype=torch.bool),
            latent_cond=torch.zeros(b, 12, 4),
        ),
    ),
    "MiniMaxMusic3Transformer1DModel": TinyDenoiser(
        dict(
            in_channels=4, condition_dim=6, num_layers=2, num_attention_heads=2, attention_head_dim=16,
            ff_inner_dim=48, rotary_dim=8, fourier_embedding_dim=16,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 12),
            timestep=between(g, b, 0, 1),
            encoder_hidden_states=noise(g, b, 12, 6),
        ),
    ),
    "StableAudio3DiTModel": TinyDenoiser(
        dict(
            io_channels=4, embed_dim=32, depth=2, num_heads=2, cond_token_dim=12, global_cond_dim=10,
            local_add_cond_dim=5, timestep_features_dim=16, num_memory_tokens=2,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 12),
            timestep=between(g, b, 0, 1),
            encoder_hidden_states=noise(g, b, 5, 12),
            global_hidden_states=noise(g, b, 10),
            encoder_attention_mask=lengths_differ(b, 5),
        ),
    ),
    "StableAudioDiTModel": TinyDenoiser(
        dict(
            sample_size=12, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            num_key_value_attention_heads=1, cross_attention_dim=16, time_proj_dim=16, global_states_input_dim=10,
            cross_attention_input_dim=12,
        ),
        # One timestep for the whole batch, as the pipeline has it.
        lambda b, g: dict(
            hidden_states=noise(g, b, 4, 12),
            timestep=between(g, 1, 0, 1),
            encoder_hidden_states=noise(g, b, 5, 12),
            global_hidden_states=noise(g, b, 1, 10),
            rotary_embedding=(noise(g, 13, 8).cos(), noise(g, 13, 8).sin()),
        ),
    ),
}  # fmt: skip
