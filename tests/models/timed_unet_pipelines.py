"""Pipelines of U-Nets around tiny ones, by class of diffusers."""

# ruff: noqa: C408
from __future__ import annotations

from diffusers import AutoencoderKLTemporalDecoder
from PIL import Image
from timed_pipeline import TimedPipeline, caption, guided
from tiny_autoencoders import tiny_vae
from transformers import CLIPImageProcessor


IMAGE = Image.new("RGB", (64, 64))
SIZE = dict(height=64, width=64)
STABLE_DIFFUSION = dict(timestep_spacing="leading", steps_offset=1)


def tiny_svd_vae() -> AutoencoderKLTemporalDecoder:
    return AutoencoderKLTemporalDecoder(block_out_channels=(32,))


UNET_PIPELINES = {
    "AnimateDiffPipeline": TimedPipeline(
        "UNetMotionModel",
        ("DDIMScheduler", dict(beta_schedule="linear", steps_offset=1)),
        lambda: dict(**guided(prompt_embeds=caption()), num_frames=3, **SIZE),
        name="unet",
    ),
    "DDPMPipeline": TimedPipeline("UNet2DModel", ("DDPMScheduler", {}), lambda: dict(output_type="np"), name="unet"),
    "I2VGenXLPipeline": TimedPipeline(
        "I2VGenXLUNet",
        ("DDIMScheduler", dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, steps_offset=1)),
        lambda: dict(image=IMAGE, **guided(prompt_embeds=caption()), num_frames=3, height=16, width=16),
        components=lambda: dict(vae=tiny_vae(), feature_extractor=CLIPImageProcessor(crop_size=8)),
        stand_ins=dict(_encode_image=lambda *_, **__: caption(1, 12).repeat(2, 1, 1)),
        name="unet",
    ),
    "StableDiffusionPipeline": TimedPipeline(
        "UNet2DConditionModel",
        ("PNDMScheduler", dict(**STABLE_DIFFUSION, skip_prk_steps=True)),
        lambda: dict(**guided(prompt_embeds=caption()), **SIZE),
        components=lambda: dict(vae=None, requires_safety_checker=False),
        name="unet",
    ),
    "StableDiffusionXLPipeline": TimedPipeline(
        "UNet2DConditionModel",
        ("EulerDiscreteScheduler", STABLE_DIFFUSION),
        lambda: dict(
            **guided(prompt_embeds=caption(), pooled_prompt_embeds=caption(10)),
            original_size=(64, 64), target_size=(64, 64), **SIZE,
        ),
        config=dict(
            addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=34
        ),
        name="unet",
    ),
    "StableVideoDiffusionPipeline": TimedPipeline(
        "UNetSpatioTemporalConditionModel",
        (
            "EulerDiscreteScheduler",
            dict(
                prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002,
                sigma_max=700.0,
            ),
        ),
        lambda: dict(image=IMAGE, num_frames=3, height=8, width=8),
        components=lambda: dict(vae=tiny_svd_vae()),
        stand_ins=dict(_encode_image=lambda *_, **__: caption(1, 12).repeat(2, 1, 1)),
        name="unet",
    ),
    "TextToVideoSDPipeline": TimedPipeline(
        "UNet3DConditionModel",
        ("DDIMScheduler", dict(steps_offset=1)),
        lambda: dict(**guided(prompt_embeds=caption()), num_frames=3, **SIZE),
        name="unet",
    ),
}  # fmt: skip
