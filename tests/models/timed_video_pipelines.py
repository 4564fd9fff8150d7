"""Pipelines of videos around tiny denoisers, by class of diffusers."""

# ruff: noqa: C408
from __future__ import annotations

from timed_pipeline import TimedPipeline, caption, flow, flow_multistep, guided, whole


SIZE = dict(num_frames=9, height=64, width=96)


def masked_caption(width: int = 12) -> dict:
    return guided(prompt_embeds=caption(5, width), prompt_attention_mask=whole())


VIDEO_PIPELINES = {
    "CogVideoXPipeline": TimedPipeline(
        "CogVideoXTransformer3DModel",
        (
            "CogVideoXDDIMScheduler",
            dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        ),
        lambda: dict(**guided(prompt_embeds=caption()), num_frames=9, height=32, width=48),
    ),
    "HunyuanVideoPipeline": TimedPipeline(
        "HunyuanVideoTransformer3DModel",
        flow(shift=7.0),
        lambda: dict(
            prompt_embeds=caption(), pooled_prompt_embeds=caption(10), prompt_attention_mask=whole(), **SIZE
        ),
    ),
    "LTXPipeline": TimedPipeline(
        "LTXVideoTransformer3DModel",
        flow(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
        lambda: dict(**masked_caption(), **SIZE),
        last=0.1,
    ),
    "MochiPipeline": TimedPipeline(
        "MochiTransformer3DModel", flow(invert_sigmas=True), lambda: dict(**masked_caption(16), **SIZE)
    ),
    "WanPipeline": TimedPipeline(
        "WanTransformer3DModel", flow_multistep(3.0), lambda: dict(**guided(prompt_embeds=caption()), **SIZE)
    ),
}  # fmt: skip
