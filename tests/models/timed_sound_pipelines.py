"""Pipelines of sound around tiny denoisers, by class of diffusers."""

# ruff: noqa: C408
from __future__ import annotations

import torch
from diffusers import AutoencoderOobleck, AutoencoderSAME, ClassifierFreeGuidance
from diffusers.modular_pipelines.minimax_music3.denoise import MiniMaxMusic3ChunkDenoiseStep
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder
from timed_pipeline import TimedBlocks, TimedPipeline, caption, flow, guided, whole


class ConditionEncoder:
    """Stands where ACE-Step brings text, lyrics and timbre together."""

    silence_latent = torch.zeros(1, 20, 4)
    null_condition_emb = torch.zeros(1, 1, 10)

    def __call__(self, **_) -> tuple[torch.Tensor, torch.Tensor]:
        return caption(5, 10), whole()


def tiny_oobleck() -> AutoencoderOobleck:
    return AutoencoderOobleck(4, [2, 2], [1, 1], 4, 4, sampling_rate=32)


SOUND_PIPELINES = {
    "AceStepPipeline": TimedPipeline(
        "AceStepTransformer1DModel",
        flow(num_train_timesteps=1),
        lambda: dict(prompt="a", audio_duration=0.48),
        components=lambda: dict(condition_encoder=ConditionEncoder()),
        stand_ins=dict(encode_prompt=lambda **_: (None,) * 4),
    ),
    "LongCatAudioDiTPipeline": TimedPipeline(
        "LongCatAudioDiTTransformer",
        flow(invert_sigmas=True),
        lambda: dict(prompt="a", latents=torch.randn(1, 12, 4)),
        components=lambda: dict(vae=tiny_oobleck()),
        stand_ins=dict(encode_prompt=lambda *_: (caption(), torch.tensor([5]))),
    ),
    "MiniMaxMusic3Blocks": TimedBlocks(
        "MiniMaxMusic3Transformer1DModel",
        flow(invert_sigmas=True, num_train_timesteps=1),
        lambda: dict(frame_hiddens=torch.zeros(1, 3, 6), chunk_starts=[0]),
        components=lambda: dict(
            guider=ClassifierFreeGuidance(), condition_encoder=lambda frame_hiddens: caption(12, 6)
        ),
        blocks=lambda: {"denoise": MiniMaxMusic3ChunkDenoiseStep()},
    ),
    "StableAudio3Pipeline": TimedPipeline(
        "StableAudio3DiTModel",
        flow(num_train_timesteps=1),
        lambda: dict(
            **guided(prompt_embeds=caption(), encoder_attention_mask=whole()), duration=1.0, guidance_scale=7.0
        ),
        components=lambda: dict(
            vae=AutoencoderSAME(
                patch_size=2, encoder_channels=4, encoder_c_mults=(1,), encoder_strides=(2,),
                encoder_transformer_depths=(1,), latent_dim=4, dim_heads=4, sampling_rate=48,
            ),
            duration_embedder=StableAudio3DurationEmbedder(output_dim=12, fourier_dim=8),
        ),
        config=dict(global_cond_dim=12),
        last=0.12,
    ),
    "StableAudioPipeline": TimedPipeline(
        "StableAudioDiTModel",
        (
            "CosineDPMSolverMultistepScheduler",
            dict(sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, prediction_type="v_prediction"),
        ),
        lambda: guided(prompt_embeds=caption(), attention_mask=whole()),
        components=lambda: dict(
            vae=tiny_oobleck(), projection_model=StableAudioProjectionModel(12, 12, min_value=0, max_value=512)
        ),
        config=dict(global_states_input_dim=24),
        last=0.19,
        requires="torchsde",
    ),
}  # fmt: skip
