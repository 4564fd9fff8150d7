"""Pipelines of diffusers around tiny denoisers, by class."""

# ruff: noqa: C408
from __future__ import annotations

import torch
from diffusers import AutoencoderKLTemporalDecoder, ClassifierFreeGuidance
from diffusers.modular_pipelines.flux3.before_denoise import Flux3SetTimestepsStep
from diffusers.modular_pipelines.flux3.denoise import Flux3DenoiseStep
from diffusers.modular_pipelines.minimax_music3.denoise import MiniMaxMusic3ChunkDenoiseStep
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from PIL import Image
from timed_parts import (
    ConditionEncoder,
    NoProcessor,
    NoSafetyChecker,
    flux_3_call,
    packed_layout,
    stable_audio_3,
    stand_in,
    tiny_hunyuan_vae,
    tiny_ltx_2,
    tiny_oobleck,
)
from timed_pipeline import TimedPipeline, caption, guided, whole
from tiny_autoencoders import tiny_ltx_vae, tiny_vae, tiny_wan_vae
from tiny_denoisers import build, inputs
from transformers import CLIPImageProcessor


IMAGE = dict(image=Image.new("RGB", (96, 64)))
# Where latents span two frames and two pixels.
SMALL = dict(num_frames=5, height=16, width=16)
DPM_SOLVER = ("DPMSolverMultistepScheduler", {})
V_PREDICTION = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True)
COGVIDEOX = dict(**V_PREDICTION, timestep_spacing="trailing")
STABLE_DIFFUSION = dict(timestep_spacing="leading", steps_offset=1)
TWO_TEXTS = guided(prompt_embeds_2=caption(3, 10), prompt_embeds_mask_2=whole(3))


def flow(**settings) -> tuple[str, dict]:
    return "FlowMatchEulerDiscreteScheduler", settings


def dynamic(**settings) -> tuple[str, dict]:
    return flow(use_dynamic_shifting=True, **settings)


def multistep(shift: float, scheduler: str = "UniPCMultistepScheduler", **settings) -> tuple[str, dict]:
    return scheduler, dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, **settings)


LTX = dynamic(base_shift=0.95, max_shift=2.05, shift_terminal=0.1)


PIPELINES = {
    # Images.
    "AuraFlowPipeline": TimedPipeline("AuraFlowTransformer2DModel", flow(shift=1.73)),
    "BriaFibo2Pipeline": TimedPipeline(
        "BriaFibo2Transformer2DModel", dynamic(), guided(prompt_embeds=caption(2, 5, 12))
    ),
    "BriaFiboPipeline": TimedPipeline(
        "BriaFiboTransformer2DModel", dynamic(), dict(prompt="a", guidance_scale=1.0),
        stand_ins=dict(
            encode_prompt=stand_in((caption(), None, torch.zeros(5, 3), whole(), None, [caption(5, 10)] * 4, None))
        ),
    ),
    "BriaPipeline": TimedPipeline(
        "BriaTransformer2DModel", dynamic(), dict(height=16, width=16), lambda: dict(vae=tiny_vae())
    ),
    "ChromaPipeline": TimedPipeline(
        "ChromaTransformer2DModel", flow(use_beta_sigmas=True), guided(prompt_attention_mask=whole().float())
    ),
    "CogView3PlusPipeline": TimedPipeline(
        "CogView3PlusTransformer2DModel", ("CogVideoXDDIMScheduler", COGVIDEOX), dict(original_size=(64, 64))
    ),
    "CogView4Pipeline": TimedPipeline(
        "CogView4Transformer2DModel", dynamic(base_shift=0.25, max_shift=0.75, time_shift_type="linear"),
        dict(original_size=(64, 64)),
    ),
    "DiTPipeline": TimedPipeline(
        "DiTTransformer2DModel", DPM_SOLVER, dict(class_labels=[1], guidance_scale=1.0, output_type="np"),
        lambda: dict(vae=tiny_vae()),
    ),
    "ErnieImagePipeline": TimedPipeline(
        "ErnieImageTransformer2DModel", flow(shift=3.0), guided(prompt_embeds=[caption()[0]])
    ),
    "Flux2Pipeline": TimedPipeline("Flux2Transformer2DModel", dynamic(shift=3.0)),
    "Flux3Blocks": TimedPipeline(
        "Flux3Transformer2DModel", flow(shift=6.93), flux_3_call(**inputs("Flux3Transformer2DModel", batch=1)),
        components=lambda: dict(guider=ClassifierFreeGuidance(guidance_scale=1.0)),
        blocks=lambda: {"set_timesteps": Flux3SetTimestepsStep(), "denoise": Flux3DenoiseStep()},
    ),
    "FluxPipeline": TimedPipeline("FluxTransformer2DModel", dynamic(shift=3.0)),
    "GlmImagePipeline": TimedPipeline(
        "GlmImageTransformer2DModel", dynamic(base_shift=0.25, max_shift=0.75, time_shift_type="linear"),
        dict(prior_token_ids=torch.zeros(1, 16, dtype=torch.long)),
    ),
    "HiDreamImagePipeline": TimedPipeline(
        "HiDreamImageTransformer2DModel", flow(shift=3.0),
        guided(
            prompt_embeds_t5=caption(), prompt_embeds_llama3=caption(5, 10)[None].repeat(4, 1, 1, 1),
            pooled_prompt_embeds=caption(8),
        ),
        stand_ins=dict(default_sample_size=8),
    ),
    "HunyuanImagePipeline": TimedPipeline("HunyuanImageTransformer2DModel", flow(shift=5.0), TWO_TEXTS),
    "Ideogram4Pipeline": TimedPipeline(
        "Ideogram4Transformer2DModel", flow(),
        dict(prompt="a", guidance_scale=1.0, guidance_schedule=None, max_sequence_length=5, width=48),
        components=lambda: dict(unconditional_transformer=build("Ideogram4Transformer2DModel")),
        stand_ins=dict(encode_prompt=packed_layout),
    ),
    "JoyImageEditPipeline": TimedPipeline("JoyImageEditTransformer3DModel", flow(shift=1.5)),
    "JoyImageEditPlusPipeline": TimedPipeline(
        "JoyImageEditPlusTransformer3DModel", flow(shift=1.5),
        dict(prompt="a", **guided(prompt_embeds=None)),
        stand_ins=dict(encode_prompt_multiple_images=stand_in((caption(), whole()))),
    ),
    "KandinskyV22PriorPipeline": TimedPipeline(
        "PriorTransformer", ("UnCLIPScheduler", dict(prediction_type="sample", clip_sample_range=5.0)),
        dict(prompt="a", guidance_scale=1.0, output_type="pt"),
        stand_ins=dict(
            _encode_prompt=stand_in((caption(12), caption(), whole().bool())), get_zero_embed=stand_in(None)
        ),
    ),
    "Krea2Pipeline": TimedPipeline(
        "Krea2Transformer2DModel", dynamic(),
        guided(prompt_embeds=caption(5, 2, 12), prompt_embeds_mask=whole().bool()),
    ),
    "LongCatImagePipeline": TimedPipeline(
        "LongCatImageTransformer2DModel", dynamic(), dict(enable_prompt_rewrite=False), config=dict(in_channels=64),
        stand_ins=dict(encode_prompt=stand_in((caption(), torch.zeros(5, 3)))),
    ),
    "Lumina2Pipeline": TimedPipeline("Lumina2Transformer2DModel", flow(shift=6.0)),
    "LuminaPipeline": TimedPipeline("LuminaNextDiT2DModel", flow()),
    "NucleusMoEImagePipeline": TimedPipeline("NucleusMoEImageTransformer2DModel", dynamic()),
    "OmniGenPipeline": TimedPipeline(
        "OmniGenTransformer2DModel", flow(invert_sigmas=True, num_train_timesteps=1),
        dict(prompt="a", height=16, width=12), lambda: dict(vae=tiny_vae()),
    ),
    "OvisImagePipeline": TimedPipeline("OvisImageTransformer2DModel", dynamic()),
    "PixArtAlphaPipeline": TimedPipeline("PixArtTransformer2DModel", DPM_SOLVER),
    "PRXPipeline": TimedPipeline("PRXTransformer2DModel", flow(shift=3.0)),
    "QwenImage21Pipeline": TimedPipeline(
        "QwenImage21Transformer2DModel", dynamic(), dict(true_cfg_scale=4.0), lambda: dict(processor=NoProcessor())
    ),
    "QwenImagePipeline": TimedPipeline(
        "QwenImageTransformer2DModel", dynamic(base_shift=0.5, max_shift=0.9, shift_terminal=0.02)
    ),
    "SanaPipeline": TimedPipeline("SanaTransformer2DModel", multistep(3.0, "DPMSolverMultistepScheduler")),
    "SanaSprintPipeline": TimedPipeline(
        "SanaTransformer2DModel", ("SCMScheduler", dict(prediction_type="trigflow", sigma_data=0.5)),
        dict(intermediate_timesteps=None), config=dict(guidance_embeds=True, timestep_scale=0.001),
    ),
    "StableDiffusion3Pipeline": TimedPipeline("SD3Transformer2DModel", flow(shift=3.0)),
    "ZImagePipeline": TimedPipeline("ZImageTransformer2DModel", flow(shift=3.0), guided(prompt_embeds=[caption()[0]])),
    # U-Nets.
    "AnimateDiffPipeline": TimedPipeline(
        "UNetMotionModel", ("DDIMScheduler", dict(beta_schedule="linear", steps_offset=1)), dict(num_frames=3)
    ),
    "DDPMPipeline": TimedPipeline("UNet2DModel", ("DDPMScheduler", {}), dict(output_type="np")),
    "I2VGenXLPipeline": TimedPipeline(
        "I2VGenXLUNet", ("DDIMScheduler", dict(**V_PREDICTION, steps_offset=1)),
        dict(**IMAGE, num_frames=3, height=16, width=16),
        lambda: dict(vae=tiny_vae(), feature_extractor=CLIPImageProcessor(crop_size=8)),
        stand_ins=dict(_encode_image=stand_in(caption(1, 12).repeat(2, 1, 1))),
    ),
    "StableDiffusionPipeline": TimedPipeline(
        "UNet2DConditionModel", ("PNDMScheduler", dict(**STABLE_DIFFUSION, skip_prk_steps=True)),
        components=lambda: dict(requires_safety_checker=False),
    ),
    "StableDiffusionXLPipeline": TimedPipeline(
        "UNet2DConditionModel", ("EulerDiscreteScheduler", STABLE_DIFFUSION),
        dict(original_size=(64, 64), target_size=(64, 64)),
        config=dict(
            addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=34
        ),
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
        dict(**IMAGE, num_frames=3, height=8, width=8),
        lambda: dict(vae=AutoencoderKLTemporalDecoder(block_out_channels=(32,))),
        stand_ins=dict(_encode_image=stand_in(caption(1, 12).repeat(2, 1, 1))),
    ),
    "TextToVideoSDPipeline": TimedPipeline(
        "UNet3DConditionModel", ("DDIMScheduler", dict(steps_offset=1)), dict(num_frames=3)
    ),
    # Videos.
    "AllegroPipeline": TimedPipeline(
        "AllegroTransformer3DModel", ("EulerAncestralDiscreteScheduler", dict(timestep_spacing="trailing")),
        dict(num_frames=5), config=dict(attention_head_dim=24, cross_attention_dim=48),
    ),
    "AnyFlowPipeline": TimedPipeline("AnyFlowTransformer3DModel", ("FlowMapEulerDiscreteScheduler", dict(shift=5.0))),
    "ChronoEditPipeline": TimedPipeline(
        "ChronoEditTransformer3DModel", multistep(2.0), dict(**IMAGE, **SMALL), lambda: dict(vae=tiny_wan_vae(2)),
        config=dict(in_channels=12, image_dim=8), stand_ins=dict(encode_image=stand_in(caption(3, 8))),
    ),
    "CogVideoXPipeline": TimedPipeline(
        "CogVideoXTransformer3DModel", ("CogVideoXDDIMScheduler", COGVIDEOX), dict(height=32, width=48)
    ),
    "ConsisIDPipeline": TimedPipeline(
        "ConsisIDTransformer3DModel", ("CogVideoXDPMScheduler", COGVIDEOX), dict(**IMAGE, height=32, width=48),
        config=dict(in_channels=8), requires="cv2",
        stand_ins=dict(prepare_latents=stand_in((torch.randn(1, 3, 4, 4, 6), torch.zeros(1, 3, 4, 4, 6)))),
    ),
    "Cosmos2_5_PredictBasePipeline": TimedPipeline(
        "CosmosTransformer3DModel", multistep(1.0, use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.01), SMALL,
        lambda: dict(safety_checker=NoSafetyChecker(), vae=tiny_wan_vae()),
        config=dict(extra_pos_embed_type=None, in_channels=5),
    ),
    "Cosmos2TextToImagePipeline": TimedPipeline(
        "CosmosTransformer3DModel", flow(use_karras_sigmas=True),
        components=lambda: dict(safety_checker=NoSafetyChecker()), config=dict(extra_pos_embed_type=None),
    ),
    "Cosmos2VideoToWorldPipeline": TimedPipeline(
        "CosmosTransformer3DModel", flow(use_karras_sigmas=True), dict(**IMAGE, **SMALL),
        lambda: dict(safety_checker=NoSafetyChecker(), vae=tiny_wan_vae()),
        config=dict(extra_pos_embed_type=None, in_channels=5), starts_known=True,
    ),
    "CosmosTextToWorldPipeline": TimedPipeline(
        "CosmosTransformer3DModel",
        ("EDMEulerScheduler", dict(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min")),
        components=lambda: dict(safety_checker=NoSafetyChecker()),
    ),
    "EasyAnimatePipeline": TimedPipeline(
        "EasyAnimateTransformer3DModel", flow(shift=5.0), components=lambda: dict(vae=tiny_hunyuan_vae())
    ),
    "HeliosPipeline": TimedPipeline(
        "HeliosTransformer3DModel", ("HeliosScheduler", dict(stages=1, stage_range=(0, 1))),
        dict(num_latent_frames_per_chunk=2, **SMALL), lambda: dict(vae=tiny_wan_vae()),
    ),
    "HunyuanVideo15Pipeline": TimedPipeline(
        "HunyuanVideo15Transformer3DModel", flow(shift=7.0), TWO_TEXTS,
        lambda: dict(guider=ClassifierFreeGuidance(), vae=tiny_hunyuan_vae()), config=dict(in_channels=9),
    ),
    "HunyuanVideoFramepackPipeline": TimedPipeline(
        "HunyuanVideoFramepackTransformer3DModel", flow(shift=7.0), dict(**IMAGE, latent_window_size=2),
        lambda: dict(vae=tiny_hunyuan_vae()), stand_ins=dict(encode_image=stand_in(caption(3, 8))),
    ),
    "HunyuanVideoPipeline": TimedPipeline("HunyuanVideoTransformer3DModel", flow(shift=7.0)),
    "Kandinsky5T2VPipeline": TimedPipeline(
        "Kandinsky5Transformer3DModel", flow(shift=5.0),
        guided(prompt_embeds_qwen=caption(), prompt_embeds_clip=caption(10), prompt_cu_seqlens=torch.tensor([0, 5])),
    ),
    "Kandinsky6SRPipeline": TimedPipeline(
        "Kandinsky6SRTransformer3DModel", flow(shift=5.0),
        dict(video=[IMAGE["image"]], resolution_scale=2, output_type="pt"), config=dict(tile_sizes=((128, 128),)),
        stand_ins=dict(
            encode_video=stand_in(torch.zeros(1, 4, 1, 8, 8)), decode_latents=stand_in(torch.zeros(1, 3, 1, 128, 128))
        ),
    ),
    "Kandinsky6TI2VAPipeline": TimedPipeline(
        "Kandinsky6Transformer3DModel", flow(shift=5.0), dict(sample_audio=False)
    ),
    "LattePipeline": TimedPipeline(
        "LatteTransformer3DModel", ("DDIMScheduler", dict(clip_sample=False)),
        dict(clean_caption=False, video_length=3),
    ),
    "LTX2Pipeline": TimedPipeline(
        "LTX2VideoTransformer3DModel", LTX, components=tiny_ltx_2, last=0.1,
        config=dict(audio_in_channels=8, audio_out_channels=8),
    ),
    "LTXImageToVideoPipeline": TimedPipeline(
        "LTXVideoTransformer3DModel", LTX, dict(**IMAGE, num_frames=5), lambda: dict(vae=tiny_ltx_vae()),
        starts_known=True, last=0.1,
    ),
    "LTXPipeline": TimedPipeline("LTXVideoTransformer3DModel", LTX, last=0.1),
    "MochiPipeline": TimedPipeline(
        "MochiTransformer3DModel", flow(invert_sigmas=True), guided(prompt_embeds=caption(5, 16))
    ),
    "MotifVideoPipeline": TimedPipeline(
        "MotifVideoTransformer3DModel", flow(shift=5.0), SMALL,
        lambda: dict(guider=ClassifierFreeGuidance(), vae=tiny_wan_vae()), config=dict(in_channels=9),
    ),
    "SanaVideoPipeline": TimedPipeline(
        "SanaVideoTransformer3DModel", multistep(8.0, "DPMSolverMultistepScheduler"), dict(frames=9)
    ),
    "SanaWMPipeline": TimedPipeline(
        "SanaWMTransformer3DModel", flow(shift=3.0),
        dict(
            prompt="a", **IMAGE, c2w=torch.eye(4).repeat(17, 1, 1).numpy(), intrinsics=[1.0] * 4,
            **guided(prompt_embeds=caption(1, 5, 12)), num_frames=17, width=96,
        ),
        stand_ins=dict(
            _encode_first_frame=stand_in(torch.zeros(1, 4, 1, 2, 3)), _build_camera_kwargs=stand_in({})
        ),
        starts_known=True,
    ),
    "SkyReelsV2DiffusionForcingPipeline": TimedPipeline(
        "SkyReelsV2Transformer3DModel", multistep(8.0), dict(prompt=None, base_num_frames=9)
    ),
    "SkyReelsV2Pipeline": TimedPipeline("SkyReelsV2Transformer3DModel", multistep(8.0)),
    "WanAnimatePipeline": TimedPipeline(
        "WanAnimateTransformer3DModel", multistep(5.0),
        dict(
            **IMAGE, pose_video=[IMAGE["image"]] * 5, face_video=[IMAGE["image"]] * 5, segment_frame_length=5,
            height=16, width=16,
        ),
        lambda: dict(vae=tiny_wan_vae(2)), stand_ins=dict(encode_image=stand_in(caption(3, 8))),
    ),
    "WanImageToVideoPipeline": TimedPipeline(
        "WanTransformer3DModel", multistep(5.0), dict(**IMAGE, **SMALL),
        lambda: dict(vae=tiny_wan_vae(), expand_timesteps=True), starts_known=True,
    ),
    "WanPipeline": TimedPipeline("WanTransformer3DModel", multistep(3.0)),
    "WanVACEPipeline": TimedPipeline(
        "WanVACETransformer3DModel", multistep(3.0), SMALL, lambda: dict(vae=tiny_wan_vae()),
        config=dict(vace_in_channels=12),
    ),
    # Sound.
    "AceStepPipeline": TimedPipeline(
        "AceStepTransformer1DModel", flow(num_train_timesteps=1), dict(prompt="a", audio_duration=0.48),
        lambda: dict(condition_encoder=ConditionEncoder()), stand_ins=dict(encode_prompt=stand_in((None,) * 4)),
    ),
    "LongCatAudioDiTPipeline": TimedPipeline(
        "LongCatAudioDiTTransformer", flow(invert_sigmas=True), dict(prompt="a", latents=torch.randn(1, 12, 4)),
        lambda: dict(vae=tiny_oobleck()), stand_ins=dict(encode_prompt=stand_in((caption(), torch.tensor([5])))),
    ),
    "MiniMaxMusic3Blocks": TimedPipeline(
        "MiniMaxMusic3Transformer1DModel", flow(invert_sigmas=True, num_train_timesteps=1),
        dict(frame_hiddens=torch.zeros(1, 3, 6), chunk_starts=[0]),
        lambda: dict(guider=ClassifierFreeGuidance(), condition_encoder=stand_in(caption(12, 6))),
        blocks=lambda: {"denoise": MiniMaxMusic3ChunkDenoiseStep()},
    ),
    "StableAudio3Pipeline": TimedPipeline(
        "StableAudio3DiTModel", flow(num_train_timesteps=1),
        dict(**guided(encoder_attention_mask=whole()), duration=1.0, guidance_scale=7.0), stable_audio_3,
        config=dict(global_cond_dim=12), last=0.12,
    ),
    "StableAudioPipeline": TimedPipeline(
        "StableAudioDiTModel",
        (
            "CosineDPMSolverMultistepScheduler",
            dict(sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, prediction_type="v_prediction"),
        ),
        guided(attention_mask=whole()),
        lambda: dict(
            vae=tiny_oobleck(), projection_model=StableAudioProjectionModel(12, 12, min_value=0, max_value=512)
        ),
        config=dict(global_states_input_dim=24), last=0.19, requires="torchsde",
    ),
}  # fmt: skip
