"""Pipelines of videos around tiny denoisers, by class of diffusers."""

# ruff: noqa: C408
from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    ClassifierFreeGuidance,
)
from PIL import Image
from timed_pipeline import TimedPipeline, caption, flow, flow_multistep, guided, whole
from tiny_autoencoders import tiny_ltx_vae, tiny_wan_vae


IMAGE = Image.new("RGB", (96, 64))
SIZE = dict(num_frames=9, height=64, width=96)
# Where latents span two frames and two pixels.
SMALL = dict(num_frames=5, height=16, width=16)
LTX = flow(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1)
COGVIDEOX = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")


def masked_caption(width: int = 12) -> dict:
    return guided(prompt_embeds=caption(5, width), prompt_attention_mask=whole())


def tiny_hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    """Whose latents span four frames and eight pixels."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2
    )


def tiny_ltx_2_vae() -> AutoencoderKLLTX2Video:
    """Whose latents span eight frames and 32 pixels."""
    return AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 3,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
    )


def tiny_ltx_2_audio_vae() -> AutoencoderKLLTX2Audio:
    """Whose latents have 2 channels of 4 frequencies."""
    return AutoencoderKLLTX2Audio(base_channels=8, latent_channels=2, mel_bins=16, num_res_blocks=1)


class Connectors:
    """Hands one text to the video and to the sound."""

    def __call__(self, embeddings, mask, padding_side):
        return embeddings, embeddings, mask


class NoSafetyChecker:
    """Stands where Cosmos refuses to go without."""

    def to(self, *_):
        return self

    def check_text_safety(self, _):
        return True


VIDEO_PIPELINES = {
    "AllegroPipeline": TimedPipeline(
        "AllegroTransformer3DModel",
        ("EulerAncestralDiscreteScheduler", dict(timestep_spacing="trailing")),
        lambda: dict(**masked_caption(), negative_prompt=None, num_frames=5, height=64, width=64),
        config=dict(attention_head_dim=24, cross_attention_dim=48),
    ),
    "AnyFlowPipeline": TimedPipeline(
        "AnyFlowTransformer3DModel",
        ("FlowMapEulerDiscreteScheduler", dict(shift=5.0)),
        lambda: dict(**guided(prompt_embeds=caption()), **SIZE),
    ),
    "ChronoEditPipeline": TimedPipeline(
        "ChronoEditTransformer3DModel",
        flow_multistep(2.0),
        lambda: dict(image=IMAGE, **guided(prompt_embeds=caption()), **SMALL),
        config=dict(in_channels=12, image_dim=8),
        components=lambda: dict(vae=tiny_wan_vae(2)),
        stand_ins=dict(encode_image=lambda *_: caption(3, 8)),
    ),
    "CogVideoXPipeline": TimedPipeline(
        "CogVideoXTransformer3DModel",
        ("CogVideoXDDIMScheduler", COGVIDEOX),
        lambda: dict(**guided(prompt_embeds=caption()), num_frames=9, height=32, width=48),
    ),
    "ConsisIDPipeline": TimedPipeline(
        "ConsisIDTransformer3DModel",
        ("CogVideoXDPMScheduler", COGVIDEOX),
        lambda: dict(image=IMAGE, **guided(prompt_embeds=caption()), num_frames=9, height=32, width=48),
        config=dict(in_channels=8),
        stand_ins=dict(prepare_latents=lambda *_, **__: (torch.randn(1, 3, 4, 4, 6), torch.zeros(1, 3, 4, 4, 6))),
        requires="cv2",
    ),
    "Cosmos2_5_PredictBasePipeline": TimedPipeline(
        "CosmosTransformer3DModel",
        flow_multistep(1.0, use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.01),
        lambda: dict(**guided(prompt_embeds=caption()), **SMALL),
        config=dict(extra_pos_embed_type=None, in_channels=5),
        components=lambda: dict(safety_checker=NoSafetyChecker(), vae=tiny_wan_vae()),
    ),
    "Cosmos2TextToImagePipeline": TimedPipeline(
        "CosmosTransformer3DModel",
        flow(use_karras_sigmas=True),
        lambda: dict(**guided(prompt_embeds=caption()), height=64, width=64),
        config=dict(extra_pos_embed_type=None),
        components=lambda: dict(safety_checker=NoSafetyChecker()),
    ),
    "Cosmos2VideoToWorldPipeline": TimedPipeline(
        "CosmosTransformer3DModel",
        flow(use_karras_sigmas=True),
        lambda: dict(image=IMAGE, **guided(prompt_embeds=caption()), **SMALL),
        config=dict(extra_pos_embed_type=None, in_channels=5),
        components=lambda: dict(safety_checker=NoSafetyChecker(), vae=tiny_wan_vae()),
        starts_known=True,
    ),
    "CosmosTextToWorldPipeline": TimedPipeline(
        "CosmosTransformer3DModel",
        ("EDMEulerScheduler", dict(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min")),
        lambda: dict(**guided(prompt_embeds=caption()), num_frames=9, height=64, width=64),
        components=lambda: dict(safety_checker=NoSafetyChecker()),
    ),
    "EasyAnimatePipeline": TimedPipeline(
        "EasyAnimateTransformer3DModel",
        flow(shift=5.0),
        lambda: dict(**masked_caption(), **SIZE),
        components=lambda: dict(vae=tiny_hunyuan_vae()),
    ),
    "HeliosPipeline": TimedPipeline(
        "HeliosTransformer3DModel",
        ("HeliosScheduler", dict(stages=1, stage_range=(0, 1))),
        lambda: dict(**guided(prompt_embeds=caption()), num_latent_frames_per_chunk=2, **SMALL),
        components=lambda: dict(vae=tiny_wan_vae()),
    ),
    "HunyuanVideo15Pipeline": TimedPipeline(
        "HunyuanVideo15Transformer3DModel",
        flow(shift=7.0),
        lambda: dict(
            **guided(
                prompt_embeds=caption(), prompt_embeds_mask=whole(), prompt_embeds_2=caption(3, 10),
                prompt_embeds_mask_2=whole(3),
            ),
            **SIZE,
        ),
        components=lambda: dict(guider=ClassifierFreeGuidance(), vae=tiny_hunyuan_vae()),
        config=dict(in_channels=9),
    ),
    "HunyuanVideoFramepackPipeline": TimedPipeline(
        "HunyuanVideoFramepackTransformer3DModel",
        flow(shift=7.0),
        lambda: dict(
            image=IMAGE, prompt_embeds=caption(), pooled_prompt_embeds=caption(10), prompt_attention_mask=whole(),
            latent_window_size=2, **SIZE,
        ),
        components=lambda: dict(vae=tiny_hunyuan_vae()),
        stand_ins=dict(encode_image=lambda *_, **__: caption(3, 8)),
    ),
    "HunyuanVideoPipeline": TimedPipeline(
        "HunyuanVideoTransformer3DModel",
        flow(shift=7.0),
        lambda: dict(
            prompt_embeds=caption(), pooled_prompt_embeds=caption(10), prompt_attention_mask=whole(), **SIZE
        ),
    ),
    "Kandinsky5T2VPipeline": TimedPipeline(
        "Kandinsky5Transformer3DModel",
        flow(shift=5.0),
        lambda: dict(
            **guided(
                prompt_embeds_qwen=caption(), prompt_embeds_clip=caption(10), prompt_cu_seqlens=torch.tensor([0, 5])
            ),
            **SIZE,
        ),
    ),
    "Kandinsky6SRPipeline": TimedPipeline(
        "Kandinsky6SRTransformer3DModel",
        flow(shift=5.0),
        lambda: dict(video=[IMAGE], resolution_scale=2, output_type="pt"),
        config=dict(tile_sizes=((128, 128),)),
        stand_ins=dict(
            encode_video=lambda video: torch.zeros(1, 4, 1, 8, 8),
            decode_latents=lambda latents: torch.zeros(1, 3, 1, 128, 128),
        ),
    ),
    "Kandinsky6TI2VAPipeline": TimedPipeline(
        "Kandinsky6Transformer3DModel",
        flow(shift=5.0),
        lambda: dict(**guided(prompt_embeds=caption(), pooled_prompt_embeds=caption(10)), sample_audio=False, **SIZE),
    ),
    "LattePipeline": TimedPipeline(
        "LatteTransformer3DModel",
        ("DDIMScheduler", dict(clip_sample=False)),
        lambda: dict(
            **guided(prompt_embeds=caption()), negative_prompt=None, clean_caption=False, video_length=3, height=64,
            width=64,
        ),
    ),
    "LTX2Pipeline": TimedPipeline(
        "LTX2VideoTransformer3DModel",
        LTX,
        lambda: dict(**masked_caption(), **SIZE),
        components=lambda: dict(connectors=Connectors(), vae=tiny_ltx_2_vae(), audio_vae=tiny_ltx_2_audio_vae()),
        config=dict(audio_in_channels=8, audio_out_channels=8),
        last=0.1,
    ),
    "LTXImageToVideoPipeline": TimedPipeline(
        "LTXVideoTransformer3DModel",
        LTX,
        lambda: dict(image=IMAGE, **masked_caption(), num_frames=5, height=64, width=64),
        components=lambda: dict(vae=tiny_ltx_vae()),
        starts_known=True,
        last=0.1,
    ),
    "LTXPipeline": TimedPipeline(
        "LTXVideoTransformer3DModel",
        LTX,
        lambda: dict(**masked_caption(), **SIZE),
        last=0.1,
    ),
    "MochiPipeline": TimedPipeline(
        "MochiTransformer3DModel", flow(invert_sigmas=True), lambda: dict(**masked_caption(16), **SIZE)
    ),
    "MotifVideoPipeline": TimedPipeline(
        "MotifVideoTransformer3DModel",
        flow(shift=5.0),
        lambda: dict(**masked_caption(), **SMALL),
        components=lambda: dict(guider=ClassifierFreeGuidance(), vae=tiny_wan_vae()),
        config=dict(in_channels=9),
    ),
    "SanaVideoPipeline": TimedPipeline(
        "SanaVideoTransformer3DModel",
        flow_multistep(8.0, "DPMSolverMultistepScheduler"),
        lambda: dict(
            **masked_caption(), negative_prompt=None, use_resolution_binning=False, frames=9, height=64, width=96
        ),
    ),
    "SanaWMPipeline": TimedPipeline(
        "SanaWMTransformer3DModel",
        flow(shift=3.0),
        lambda: dict(
            prompt="a", image=IMAGE, c2w=torch.eye(4).repeat(17, 1, 1).numpy(), intrinsics=[1.0] * 4,
            **guided(prompt_embeds=caption(1, 5, 12), prompt_attention_mask=whole()), num_frames=17, height=64,
            width=96,
        ),
        stand_ins=dict(
            _encode_first_frame=lambda *_: torch.zeros(1, 4, 1, 2, 3), _build_camera_kwargs=lambda *_, **__: {}
        ),
        starts_known=True,
    ),
    "SkyReelsV2DiffusionForcingPipeline": TimedPipeline(
        "SkyReelsV2Transformer3DModel",
        flow_multistep(8.0),
        lambda: dict(prompt=None, **guided(prompt_embeds=caption()), base_num_frames=9, **SIZE),
    ),
    "SkyReelsV2Pipeline": TimedPipeline(
        "SkyReelsV2Transformer3DModel", flow_multistep(8.0), lambda: dict(**guided(prompt_embeds=caption()), **SIZE)
    ),
    "WanAnimatePipeline": TimedPipeline(
        "WanAnimateTransformer3DModel",
        flow_multistep(5.0),
        lambda: dict(
            image=IMAGE, pose_video=[IMAGE] * 5, face_video=[IMAGE] * 5, **guided(prompt_embeds=caption()),
            segment_frame_length=5, height=16, width=16,
        ),
        components=lambda: dict(vae=tiny_wan_vae(2)),
        stand_ins=dict(encode_image=lambda *_: caption(3, 8)),
    ),
    "WanImageToVideoPipeline": TimedPipeline(
        "WanTransformer3DModel",
        flow_multistep(5.0),
        lambda: dict(image=IMAGE, **guided(prompt_embeds=caption()), **SMALL),
        components=lambda: dict(vae=tiny_wan_vae(), expand_timesteps=True),
        starts_known=True,
    ),
    "WanPipeline": TimedPipeline(
        "WanTransformer3DModel", flow_multistep(3.0), lambda: dict(**guided(prompt_embeds=caption()), **SIZE)
    ),
    "WanVACEPipeline": TimedPipeline(
        "WanVACETransformer3DModel",
        flow_multistep(3.0),
        lambda: dict(**guided(prompt_embeds=caption()), **SMALL),
        config=dict(vace_in_channels=12),
        components=lambda: dict(vae=tiny_wan_vae()),
    ),
}  # fmt: skip
