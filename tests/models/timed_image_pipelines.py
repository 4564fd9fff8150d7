"""Pipelines of images around tiny denoisers, by class of diffusers."""

# ruff: noqa: C408
from __future__ import annotations

from timed_pipeline import TimedPipeline, caption, flow, flow_multistep, guided, whole
from tiny_text_encoders import tiny_vae


SIZE = dict(height=64, width=64)
DPM_SOLVER = ("DPMSolverMultistepScheduler", {})
STABLE_DIFFUSION = dict(timestep_spacing="leading", steps_offset=1)


def masked_caption() -> dict:
    return guided(prompt_embeds=caption(), prompt_attention_mask=whole())


IMAGE_PIPELINES = {
    "AuraFlowPipeline": TimedPipeline(
        "AuraFlowTransformer2DModel", flow(shift=1.73), lambda: dict(**masked_caption(), **SIZE)
    ),
    "ChromaPipeline": TimedPipeline(
        "ChromaTransformer2DModel",
        flow(use_beta_sigmas=True),
        lambda: dict(**guided(prompt_embeds=caption(), prompt_attention_mask=whole().float()), **SIZE),
    ),
    "DDPMPipeline": TimedPipeline("UNet2DModel", ("DDPMScheduler", {}), lambda: dict(output_type="np"), name="unet"),
    "DiTPipeline": TimedPipeline(
        "DiTTransformer2DModel",
        DPM_SOLVER,
        lambda: dict(class_labels=[1], guidance_scale=1.0, output_type="np"),
        components=lambda: dict(vae=tiny_vae()),
    ),
    "Flux2Pipeline": TimedPipeline(
        "Flux2Transformer2DModel",
        flow(shift=3.0, use_dynamic_shifting=True),
        lambda: dict(prompt_embeds=caption(), **SIZE),
    ),
    "FluxPipeline": TimedPipeline(
        "FluxTransformer2DModel",
        flow(shift=3.0, use_dynamic_shifting=True),
        lambda: dict(prompt_embeds=caption(), pooled_prompt_embeds=caption(10), **SIZE),
    ),
    "Lumina2Pipeline": TimedPipeline(
        "Lumina2Transformer2DModel", flow(shift=6.0), lambda: dict(**masked_caption(), **SIZE)
    ),
    "PixArtAlphaPipeline": TimedPipeline(
        "PixArtTransformer2DModel",
        DPM_SOLVER,
        lambda: dict(**masked_caption(), negative_prompt=None, use_resolution_binning=False, **SIZE),
    ),
    "PixArtSigmaPipeline": TimedPipeline(
        "PixArtTransformer2DModel",
        DPM_SOLVER,
        lambda: dict(**masked_caption(), negative_prompt=None, use_resolution_binning=False, **SIZE),
    ),
    "QwenImagePipeline": TimedPipeline(
        "QwenImageTransformer2DModel",
        flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02),
        lambda: dict(**guided(prompt_embeds=caption(), prompt_embeds_mask=whole()), **SIZE),
    ),
    "SanaPipeline": TimedPipeline(
        "SanaTransformer2DModel",
        flow_multistep(3.0, "DPMSolverMultistepScheduler"),
        lambda: dict(**masked_caption(), negative_prompt=None, use_resolution_binning=False, **SIZE),
    ),
    "StableDiffusion3Pipeline": TimedPipeline(
        "SD3Transformer2DModel",
        flow(shift=3.0),
        lambda: dict(**guided(prompt_embeds=caption(), pooled_prompt_embeds=caption(10)), **SIZE),
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
    "ZImagePipeline": TimedPipeline(
        "ZImageTransformer2DModel", flow(shift=3.0), lambda: dict(**guided(prompt_embeds=[caption()[0]]), **SIZE)
    ),
}  # fmt: skip
