"""Pipelines of images around tiny denoisers, by class of diffusers."""

# ruff: noqa: C408
from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines.flux3.before_denoise import Flux3SetTimestepsStep
from diffusers.modular_pipelines.flux3.denoise import Flux3DenoiseStep
from timed_pipeline import TimedBlocks, TimedPipeline, caption, flow, flow_multistep, guided, whole
from tiny_denoisers import build, inputs
from tiny_text_encoders import tiny_vae


SIZE = dict(height=64, width=64)
DPM_SOLVER = ("DPMSolverMultistepScheduler", {})


def masked_caption() -> dict:
    return guided(prompt_embeds=caption(), prompt_attention_mask=whole())


def packed_layout() -> tuple[torch.Tensor, ...]:
    arguments = inputs("Ideogram4Transformer2DModel", batch=1)
    return tuple(arguments[n] for n in ("encoder_hidden_states", "position_ids", "segment_ids", "indicator"))


def flux_3_call(hidden_states, encoder_hidden_states, timestep, **ids) -> dict:
    return dict(latents=hidden_states, denoiser_input_fields=dict(prompt_embeds=encoder_hidden_states, **ids))


class OmniGenProcessor:
    """Stands where OmniGen's needs torchvision."""

    max_image_size = 1024

    def __init__(self, *_, **__):
        pass

    def __call__(self, *_, **__) -> dict:
        arguments = inputs("OmniGenTransformer2DModel", batch=2)
        return {name: arguments[name] for name in ("input_ids", "attention_mask", "position_ids")} | {
            "input_pixel_values": [],
            "input_image_sizes": {},
        }


class NoProcessor:
    """Qwen-Image 2.1 asks it how long the beginning of every prompt is, and for the number of a token."""

    tokenizer = SimpleNamespace(encode=lambda text: [0])

    def apply_chat_template(self, *_, **__) -> list[list[int]]:
        return [[]]


IMAGE_PIPELINES = {
    "AuraFlowPipeline": TimedPipeline(
        "AuraFlowTransformer2DModel", flow(shift=1.73), lambda: dict(**masked_caption(), **SIZE)
    ),
    "BriaFibo2Pipeline": TimedPipeline(
        "BriaFibo2Transformer2DModel",
        flow(use_dynamic_shifting=True),
        lambda: dict(
            **guided(prompt_embeds=caption(2, 5, 12), prompt_embeds_mask=whole()), height=64, width=64
        ),
    ),
    "BriaFiboPipeline": TimedPipeline(
        "BriaFiboTransformer2DModel",
        flow(use_dynamic_shifting=True),
        lambda: dict(prompt="a", guidance_scale=1.0, **SIZE),
        stand_ins=dict(
            encode_prompt=lambda **_: (
                caption(), None, torch.zeros(5, 3), whole(), None, [caption(5, 10)] * 4, None
            )
        ),
    ),
    "BriaPipeline": TimedPipeline(
        "BriaTransformer2DModel",
        flow(use_dynamic_shifting=True),
        lambda: dict(**guided(prompt_embeds=caption()), height=16, width=16),
        components=lambda: dict(vae=tiny_vae()),
    ),
    "ChromaPipeline": TimedPipeline(
        "ChromaTransformer2DModel",
        flow(use_beta_sigmas=True),
        lambda: dict(**guided(prompt_embeds=caption(), prompt_attention_mask=whole().float()), **SIZE),
    ),
    "CogView3PlusPipeline": TimedPipeline(
        "CogView3PlusTransformer2DModel",
        (
            "CogVideoXDDIMScheduler",
            dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        ),
        lambda: dict(**guided(prompt_embeds=caption()), original_size=(64, 64), **SIZE),
    ),
    "CogView4Pipeline": TimedPipeline(
        "CogView4Transformer2DModel",
        flow(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"),
        lambda: dict(**guided(prompt_embeds=caption()), original_size=(64, 64), **SIZE),
    ),
    "DiTPipeline": TimedPipeline(
        "DiTTransformer2DModel",
        DPM_SOLVER,
        lambda: dict(class_labels=[1], guidance_scale=1.0, output_type="np"),
        components=lambda: dict(vae=tiny_vae()),
    ),
    "ErnieImagePipeline": TimedPipeline(
        "ErnieImageTransformer2DModel", flow(shift=3.0), lambda: dict(**guided(prompt_embeds=[caption()[0]]), **SIZE)
    ),
    "Flux2Pipeline": TimedPipeline(
        "Flux2Transformer2DModel",
        flow(shift=3.0, use_dynamic_shifting=True),
        lambda: dict(prompt_embeds=caption(), **SIZE),
    ),
    "Flux3Blocks": TimedBlocks(
        "Flux3Transformer2DModel",
        flow(shift=6.93),
        lambda: flux_3_call(**inputs("Flux3Transformer2DModel", batch=1)),
        components=lambda: dict(guider=ClassifierFreeGuidance(guidance_scale=1.0)),
        blocks=lambda: {"set_timesteps": Flux3SetTimestepsStep(), "denoise": Flux3DenoiseStep()},
    ),
    "FluxPipeline": TimedPipeline(
        "FluxTransformer2DModel",
        flow(shift=3.0, use_dynamic_shifting=True),
        lambda: dict(prompt_embeds=caption(), pooled_prompt_embeds=caption(10), **SIZE),
    ),
    "GlmImagePipeline": TimedPipeline(
        "GlmImageTransformer2DModel",
        flow(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"),
        lambda: dict(
            **guided(prompt_embeds=caption()), prior_token_ids=torch.zeros(1, 16, dtype=torch.long), **SIZE
        ),
    ),
    "HiDreamImagePipeline": TimedPipeline(
        "HiDreamImageTransformer2DModel",
        flow(shift=3.0),
        lambda: dict(
            **guided(
                prompt_embeds_t5=caption(), prompt_embeds_llama3=caption(5, 10)[None].repeat(4, 1, 1, 1),
                pooled_prompt_embeds=caption(8),
            ),
            **SIZE,
        ),
        stand_ins=dict(default_sample_size=8),
    ),
    "HunyuanImagePipeline": TimedPipeline(
        "HunyuanImageTransformer2DModel",
        flow(shift=5.0),
        lambda: dict(
            **guided(
                prompt_embeds=caption(), prompt_embeds_mask=whole(), prompt_embeds_2=caption(3, 10),
                prompt_embeds_mask_2=whole(3),
            ),
            **SIZE,
        ),
    ),
    "Ideogram4Pipeline": TimedPipeline(
        "Ideogram4Transformer2DModel",
        flow(),
        lambda: dict(
            prompt="a", guidance_scale=1.0, guidance_schedule=None, max_sequence_length=5, height=64, width=48
        ),
        components=lambda: dict(unconditional_transformer=build("Ideogram4Transformer2DModel")),
        stand_ins=dict(encode_prompt=lambda **_: packed_layout()),
    ),
    "JoyImageEditPipeline": TimedPipeline(
        "JoyImageEditTransformer3DModel",
        flow(shift=1.5),
        lambda: dict(**guided(prompt_embeds=caption(), prompt_embeds_mask=whole()), **SIZE),
    ),
    "JoyImageEditPlusPipeline": TimedPipeline(
        "JoyImageEditPlusTransformer3DModel",
        flow(shift=1.5),
        lambda: dict(prompt="a", **SIZE),
        stand_ins=dict(encode_prompt_multiple_images=lambda **_: (caption(), whole())),
    ),
    "KandinskyV22PriorPipeline": TimedPipeline(
        "PriorTransformer",
        ("UnCLIPScheduler", dict(prediction_type="sample", clip_sample_range=5.0)),
        lambda: dict(prompt="a", guidance_scale=1.0, output_type="pt"),
        stand_ins=dict(
            _encode_prompt=lambda *_, **__: (caption(12), caption(), whole().bool()),
            get_zero_embed=lambda *_, **__: None,
        ),
        name="prior",
    ),
    "Krea2Pipeline": TimedPipeline(
        "Krea2Transformer2DModel",
        flow(use_dynamic_shifting=True),
        lambda: dict(**guided(prompt_embeds=caption(5, 2, 12), prompt_embeds_mask=whole().bool()), **SIZE),
    ),
    "LongCatImagePipeline": TimedPipeline(
        "LongCatImageTransformer2DModel",
        flow(use_dynamic_shifting=True),
        lambda: dict(**guided(prompt_embeds=caption()), enable_prompt_rewrite=False, **SIZE),
        config=dict(in_channels=64),
        stand_ins=dict(encode_prompt=lambda **_: (caption(), torch.zeros(5, 3))),
    ),
    "Lumina2Pipeline": TimedPipeline(
        "Lumina2Transformer2DModel", flow(shift=6.0), lambda: dict(**masked_caption(), **SIZE)
    ),
    "LuminaPipeline": TimedPipeline(
        "LuminaNextDiT2DModel", flow(), lambda: dict(**masked_caption(), **SIZE)
    ),
    "NucleusMoEImagePipeline": TimedPipeline(
        "NucleusMoEImageTransformer2DModel",
        flow(use_dynamic_shifting=True),
        lambda: dict(**guided(prompt_embeds=caption(), prompt_embeds_mask=whole()), **SIZE),
    ),
    "OmniGenPipeline": TimedPipeline(
        "OmniGenTransformer2DModel",
        flow(invert_sigmas=True, num_train_timesteps=1),
        lambda: dict(prompt="a", height=8, width=6),
        components=lambda: dict(vae=tiny_vae()),
    ),
    "OvisImagePipeline": TimedPipeline(
        "OvisImageTransformer2DModel",
        flow(use_dynamic_shifting=True),
        lambda: dict(**guided(prompt_embeds=caption()), negative_prompt=None, **SIZE),
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
    "PRXPipeline": TimedPipeline(
        "PRXTransformer2DModel",
        flow(shift=3.0),
        lambda: dict(**masked_caption(), negative_prompt=None, use_resolution_binning=False, **SIZE),
    ),
    "QwenImage21Pipeline": TimedPipeline(
        "QwenImage21Transformer2DModel",
        flow(use_dynamic_shifting=True),
        lambda: dict(**guided(prompt_embeds=caption(), prompt_embeds_mask=whole()), true_cfg_scale=4.0, **SIZE),
        components=lambda: dict(processor=NoProcessor()),
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
    "SanaSprintPipeline": TimedPipeline(
        "SanaTransformer2DModel",
        ("SCMScheduler", dict(prediction_type="trigflow", sigma_data=0.5)),
        lambda: dict(
            prompt_embeds=caption(), prompt_attention_mask=whole(), use_resolution_binning=False,
            intermediate_timesteps=None, **SIZE,
        ),
        config=dict(guidance_embeds=True, timestep_scale=0.001),
    ),
    "StableDiffusion3Pipeline": TimedPipeline(
        "SD3Transformer2DModel",
        flow(shift=3.0),
        lambda: dict(**guided(prompt_embeds=caption(), pooled_prompt_embeds=caption(10)), **SIZE),
    ),
    "ZImagePipeline": TimedPipeline(
        "ZImageTransformer2DModel", flow(shift=3.0), lambda: dict(**guided(prompt_embeds=[caption()[0]]), **SIZE)
    ),
}  # fmt: skip
