"""What is not by rule in the tiny denoisers of diffusers: constructor arguments, and arguments of `forward`.

A tuple given to `forward` is the shape of one sample's noise, a function is called with batch size and generator, and
None leaves an argument out. Captions have 5 tokens, images 4 x 3 or 4 x 4, videos 2 or 3 frames of 2 x 3.
"""

# ruff: noqa: C408
from __future__ import annotations

import torch


def noise(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def lengths_differ(batch: int, tokens: int = 5) -> torch.Tensor:
    """A mask of captions `(batch, tokens)` of which every second one is two tokens shorter."""
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[1::2, -2:] = False
    return mask


def positions(*sizes: int) -> torch.Tensor:
    """Coordinates `(product of sizes, axes)` on a grid, last axis fastest."""
    grid = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in sizes), indexing="ij")
    return torch.stack(grid, dim=-1).flatten(0, -2)


def guidance(scale: float) -> dict:
    return dict(guidance=lambda b, g: torch.full((b,), scale))


PACKED = dict(in_channels=8, out_channels=8, hidden_states=(12, 8))
FOUR_AXES = dict(axes_dims_rope=(4, 4, 4, 4), img_ids=positions(1, 4, 3, 1), txt_ids=positions(1, 1, 1, 5))
WAN = dict(attention_head_dim=12, hidden_states=(4, 3, 4, 6))
COGVIDEOX = dict(time_embed_dim=12, sample_frames=9, max_text_seq_length=5, hidden_states=(3, 4, 4, 6))
KANDINSKY = dict(in_visual_dim=4, out_visual_dim=4, time_dim=14, model_dim=32, ff_dim=48, num_visual_blocks=2)
KANDINSKY_TEXT = dict(in_text_dim=12, in_text_dim2=10, num_text_blocks=1, hidden_states=(2, 4, 6, 4))
LTX = dict(cross_attention_dim=32, hidden_states=(12, 4))
LTX_2 = dict(
    **LTX, audio_in_channels=6, audio_out_channels=6, audio_num_attention_heads=2, audio_attention_head_dim=12,
    audio_cross_attention_dim=24,
)  # fmt: skip


def unet(suffix: str, **more) -> dict:
    return dict(
        down_block_types=(f"CrossAttnDownBlock{suffix}", f"DownBlock{suffix}"),
        up_block_types=(f"UpBlock{suffix}", f"CrossAttnUpBlock{suffix}"),
        **{"norm_num_groups": 4, "cross_attention_dim": 12, **more},
    )


FAMILIES = {
    "AceStepTransformer1DModel": dict(
        num_hidden_layers=2, num_key_value_heads=1, head_dim=16, in_channels=12, audio_acoustic_hidden_dim=4,
        sliding_window=4, encoder_hidden_size=12, hidden_states=(12, 4), context_latents=(12, 8),
        timestep_r=lambda b, g: torch.full((b,), 0.5),
    ),
    "AllegroTransformer3DModel": dict(sample_frames=2, hidden_states=(4, 2, 4, 6)),
    "AnyFlowTransformer3DModel": dict(
        attention_head_dim=12, hidden_states=(3, 4, 4, 6), timestep=(3,),
        r_timestep=lambda b, g: torch.full((b, 3), 9.0),
    ),
    "AuraFlowTransformer2DModel": dict(num_mmdit_layers=2, num_single_dit_layers=2, pos_embed_max_size=16),
    "BriaFibo2Transformer2DModel": dict(
        dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, injection_layer_ids=(1,), perceiver_num_layers=1,
        min_num_gist_tokens=2, max_num_gist_tokens=4, gist_step=1, gist_min_text_len=3, gist_max_text_len=8,
        axes_lens=(32, 8, 8), encoder_hidden_states=(2, 5, 12),
    ),
    "BriaFiboTransformer2DModel": dict(
        **PACKED, text_encoder_dim=10, text_encoder_layers=lambda b, g: [noise(g, b, 5, 10) for _ in range(4)]
    ),
    "BriaTransformer2DModel": PACKED,
    "ChromaTransformer2DModel": dict(
        **PACKED, approximator_num_channels=16, approximator_hidden_dim=24, approximator_layers=1
    ),
    "ChronoEditTransformer3DModel": dict(**WAN, rope_temporal_skip_len=4),
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "CogView3PlusTransformer2DModel": {},
    "CogView4Transformer2DModel": dict(rope_axes_dim=(8, 8)),
    "ConsisIDTransformer3DModel": COGVIDEOX,
    "CosmosTransformer3DModel": dict(
        adaln_lora_dim=6, max_size=(4, 8, 8), concat_padding_mask=False, hidden_states=(4, 2, 4, 6), fps=24
    ),
    "DiTTransformer2DModel": dict(
        out_channels=8, num_embeds_ada_norm=10, hidden_states=(4, 8, 8), class_labels=lambda b, g: torch.arange(b) % 10
    ),
    "EasyAnimateTransformer3DModel": dict(patch_size=2, mmdit_layers=2, hidden_states=(4, 2, 4, 6)),
    "ErnieImageTransformer2DModel": dict(
        ffn_hidden_size=48, text_in_dim=12, hidden_states=(4, 4, 3), text_bth=(5, 12),
        text_lens=lambda b, g: lengths_differ(b).sum(1),
    ),
    "Flux2Transformer2DModel": dict(**PACKED, **FOUR_AXES, **guidance(4.0), timestep_guidance_channels=16),
    "Flux3Transformer2DModel": dict(**PACKED, **FOUR_AXES, cond_in_channels=6, timestep_channels=16),
    "FluxTransformer2DModel": dict(**PACKED, **guidance(3.5), guidance_embeds=True),
    "GlmImageTransformer2DModel": dict(
        prior_vq_quantizer_codebook_size=10, prior_token_id=lambda b, g: torch.randint(10, (b, 12), generator=g),
        prior_token_drop=lambda b, g: torch.zeros(b, 12, dtype=torch.bool),
    ),
    "HeliosTransformer3DModel": dict(
        rope_dim=(4, 6, 6), hidden_states=(4, 2, 4, 6),
        # One frame that is known, then the two that are being made.
        indices_hidden_states=lambda b, g: torch.tensor([[1, 2]] * b), latents_history_short=(4, 1, 4, 6),
        indices_latents_history_short=lambda b, g: torch.tensor([[0]] * b),
    ),
    "HiDreamImageTransformer2DModel": dict(
        patch_size=2, caption_channels=[12, 10], text_emb_dim=8, num_routed_experts=4, axes_dims_rope=(4, 4, 8),
        max_resolution=(8, 8), llama_layers=[0, 1, 2, 3], hidden_states=(4, 8, 8), encoder_hidden_states_t5=(5, 12),
        encoder_hidden_states_llama3=lambda b, g: noise(g, 4, b, 5, 10), pooled_embeds=(8,), img_ids=None,
    ),
    "HunyuanImageTransformer2DModel": dict(text_embed_2_dim=10, rope_axes_dim=(8, 8), hidden_states=(4, 4, 3)),
    "HunyuanVideo15Transformer3DModel": dict(
        text_embed_2_dim=10, image_embed_dim=8, hidden_states=(4, 2, 2, 3),
        image_embeds=lambda b, g: torch.zeros(b, 2, 8),
    ),
    "HunyuanVideoFramepackTransformer3DModel": dict(
        has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True, **guidance(6000.0), image_embeds=(3, 8),
        # One frame that is known, older ones in two resolutions, then the two frames that are being made.
        hidden_states=(4, 2, 8, 8), latents_clean=(4, 1, 8, 8), latents_history_2x=(4, 2, 8, 8),
        latents_history_4x=(4, 4, 8, 8), indices_latents=torch.tensor([7, 8]), indices_latents_clean=torch.tensor([6]),
        indices_latents_history_2x=torch.tensor([4, 5]), indices_latents_history_4x=torch.arange(4),
    ),
    "HunyuanVideoTransformer3DModel": dict(**guidance(6000.0), hidden_states=(4, 2, 4, 6)),
    "Ideogram4Transformer2DModel": dict(
        in_channels=8, adaln_dim=10, llm_features_dim=12, mrope_section=(4, 2, 2),
        # The pipeline packs [caption, image]; 3 marks tokens of the caption, 2 tokens of the image.
        hidden_states=lambda b, g: torch.cat([torch.zeros(b, 5, 8), noise(g, b, 12, 8)], dim=1),
        encoder_hidden_states=lambda b, g: torch.cat([noise(g, b, 5, 12), torch.zeros(b, 12, 12)], dim=1),
        position_ids=lambda b, g: torch.cat(
            [torch.arange(5).repeat(3, 1).T, positions(1, 4, 3).long() + 5]
        ).repeat(b, 1, 1),
        segment_ids=lambda b, g: torch.ones(b, 17, dtype=torch.long),
        indicator=lambda b, g: torch.tensor([3] * 5 + [2] * 12).repeat(b, 1),
    ),
    "JoyImageEditPlusTransformer3DModel": dict(
        rope_dim_list=[4, 4, 8],
        # A sequence of patches: the image that is being made and a smaller one that it is made after.
        hidden_states=(16, 4, 1, 2, 2), shape_list=lambda b, g: [[(1, 4, 3), (1, 2, 2)]] * b,
    ),
    "JoyImageEditTransformer3DModel": dict(rope_dim_list=[4, 4, 8], hidden_states=(4, 1, 8, 6)),
    "Kandinsky5Transformer3DModel": dict(
        **KANDINSKY, **KANDINSKY_TEXT, visual_rope_pos=[torch.arange(2), torch.arange(2), torch.arange(3)],
        text_rope_pos=torch.arange(5),
    ),
    "Kandinsky6SRTransformer3DModel": dict(**KANDINSKY, hidden_states=(2, 8, 8, 9)),
    "Kandinsky6Transformer3DModel": dict(
        **KANDINSKY, **KANDINSKY_TEXT, visual_cond=False, in_audio_dim=6, out_audio_dim=6, model_dim_a=24,
        time_dim_a=14, ff_dim_a=32, axes_dims_a=(4, 4, 4), encoder_attention_mask=None,
    ),
    "Krea2Transformer2DModel": dict(
        **PACKED, num_key_value_heads=1, timestep_embed_dim=16, text_hidden_dim=12, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=16, num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1, encoder_hidden_states=(5, 2, 12),
        position_ids=torch.cat([torch.zeros(5, 3), positions(1, 4, 3)]),
    ),
    "LTX2VideoTransformer3DModel": dict(
        **LTX_2, audio_encoder_hidden_states=(5, 12), audio_encoder_attention_mask=lambda b, g: lengths_differ(b),
        audio_num_frames=7,
    ),
    "LTXVideoTransformer3DModel": LTX,
    "LatteTransformer3DModel": dict(
        out_channels=8, attention_bias=True, patch_size=2, video_length=3, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-06,
        hidden_states=(4, 3, 8, 6), encoder_attention_mask=None,
    ),
    "LongCatAudioDiTTransformer": dict(
        dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=12, latent_dim=4, hidden_states=(12, 4),
        attention_mask=lambda b, g: torch.ones(b, 12, dtype=torch.bool), latent_cond=(12, 4),
    ),
    "LongCatImageTransformer2DModel": dict(**PACKED, pooled_projection_dim=12),
    "Lumina2Transformer2DModel": dict(num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 8), axes_lens=(32, 8, 8)),
    "LuminaNextDiT2DModel": dict(
        num_kv_heads=1, multiple_of=8, cross_attention_dim=12, cross_attention_kwargs={},
        image_rotary_emb=lambda b, g: torch.polar(torch.ones(8, 8, 8), noise(g, 8, 8, 8)),
    ),
    "MiniMaxMusic3Transformer1DModel": dict(
        condition_dim=6, ff_inner_dim=48, rotary_dim=8, fourier_embedding_dim=16, hidden_states=(4, 12),
        encoder_hidden_states=(12, 6),
    ),
    "MochiTransformer3DModel": dict(
        pooled_projection_dim=24, text_embed_dim=16, time_embed_dim=16, max_sequence_length=5,
        hidden_states=(4, 2, 4, 6), encoder_hidden_states=(5, 16),
    ),
    "MotifVideoTransformer3DModel": dict(num_single_layers=4, num_decoder_layers=2, hidden_states=(4, 2, 4, 6)),
    "NucleusMoEImageTransformer2DModel": dict(
        **{**PACKED, "out_channels": 2}, dense_moe_strategy="all_moe", num_experts=2, moe_intermediate_dim=16,
        capacity_factors=1.0, img_shapes=lambda b, g: [(1, 4, 3)] * b,
    ),
    "OmniGenTransformer2DModel": dict(
        num_key_value_heads=2, pad_token_id=0, vocab_size=10, max_position_embeddings=64,
        original_max_position_embeddings=32, time_step_dim=16,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        # [caption, timestep, image]
        input_ids=lambda b, g: torch.randint(10, (b, 5), generator=g), input_img_latents=[], input_image_sizes={},
        attention_mask=lambda b, g: torch.ones(b, 18, 18),
        position_ids=lambda b, g: torch.arange(18).repeat(b, 1),
    ),
    "OvisImageTransformer2DModel": PACKED,
    "PRXTransformer2DModel": dict(
        mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8], attention_mask=lambda b, g: lengths_differ(b)
    ),
    "PixArtTransformer2DModel": {},
    "PriorTransformer": dict(
        embedding_dim=12, num_embeddings=5, hidden_states=(12,), proj_embedding=(12,),
        attention_mask=lambda b, g: lengths_differ(b),
    ),
    "QwenImage21Transformer2DModel": dict(
        **{**PACKED, "hidden_states": (16, 8)}, img_shapes=lambda b, g: [[(1, 4, 4)]] * b,
        # Each place that is marked as the image's stands for 2 x 2 tokens.
        img_mask=lambda b, g: torch.tensor([False] * 5 + [True] * 4).repeat(b, 1),
    ),
    "QwenImageTransformer2DModel": dict(
        **{**PACKED, "out_channels": 2}, img_shapes=lambda b, g: [[(1, 4, 3)]] * b
    ),
    "SD3Transformer2DModel": dict(dual_attention_layers=(0,), qk_norm="rms_norm"),
    "SanaTransformer2DModel": dict(
        num_cross_attention_heads=2, cross_attention_head_dim=16, sample_size=4, hidden_states=(4, 4, 3)
    ),
    "SanaVideoTransformer3DModel": dict(
        attention_head_dim=12, num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
        sample_size=4, hidden_states=(4, 2, 4, 6),
    ),
    "SanaWMLTX2RefinerTransformer3DModel": dict(
        **LTX_2, timestep=(12,), video_rotary_emb=lambda b, g: (noise(g, b, 12, 32).cos(), noise(g, b, 12, 32).sin())
    ),
    "SanaWMTransformer3DModel": dict(
        softmax_every_n=2, linear_head_dim=16, chunk_plucker_channels=6, chunk_plucker_post_attn_blocks=2,
        hidden_states=(4, 3, 2, 3), timestep=(1, 3), encoder_hidden_states=(1, 5, 12),
    ),
    "SkyReelsV2Transformer3DModel": dict(**WAN, timestep=(3,), enable_diffusion_forcing=True),
    "StableAudio3DiTModel": dict(
        io_channels=4, embed_dim=32, depth=2, num_heads=2, cond_token_dim=12, global_cond_dim=10, local_add_cond_dim=5,
        timestep_features_dim=16, num_memory_tokens=2, hidden_states=(4, 12), global_hidden_states=(10,),
    ),
    "StableAudioDiTModel": dict(
        sample_size=12, num_key_value_attention_heads=1, cross_attention_dim=16, time_proj_dim=16,
        global_states_input_dim=10, cross_attention_input_dim=12, hidden_states=(4, 12), global_hidden_states=(1, 10),
        # One timestep for the whole batch, as the pipeline has it.
        timestep=lambda b, g: torch.rand(1, generator=g), encoder_attention_mask=None,
        rotary_embedding=lambda b, g: (noise(g, 13, 8).cos(), noise(g, 13, 8).sin()),
    ),
    "WanAnimateTransformer3DModel": dict(
        attention_head_dim=12, in_channels=12, latent_channels=4, image_dim=8,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
        inject_face_latents_blocks=2, hidden_states=(12, 3, 4, 6), encoder_hidden_states_image=(3, 8),
        pose_hidden_states=(4, 2, 4, 6), face_pixel_values=(3, 8, 16, 16),
    ),
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": dict(
        **WAN, num_layers=3, vace_layers=[0, 2], vace_in_channels=6, control_hidden_states=(6, 3, 4, 6)
    ),
    "ZImageTransformer2DModel": dict(
        dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, axes_dims=[4, 4, 8], axes_lens=[128, 8, 8],
        x=lambda b, g: list(noise(g, b, 4, 1, 8, 6)),
        cap_feats=lambda b, g: [caption[: 5 + i] for i, caption in enumerate(noise(g, b, 5 + b, 12))],
    ),
    "I2VGenXLUNet": dict(
        **unet("3D"), attention_head_dim=8, sample=(4, 3, 8, 8), fps=lambda b, g: torch.full((b,), 16),
        image_latents=(4, 3, 8, 8), image_embeddings=(12,),
    ),
    "UNet2DConditionModel": dict(
        **unet("2D"), attention_head_dim=8, num_attention_heads=None, encoder_attention_mask=None
    ),
    "UNet2DModel": dict(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8,
    ),
    "UNet3DConditionModel": dict(**unet("3D"), attention_head_dim=8, num_attention_heads=None, sample=(4, 3, 8, 8)),
    "UNetMotionModel": dict(
        **unet("Motion"), motion_max_seq_length=4, motion_num_attention_heads=2, sample=(4, 3, 8, 8),
        encoder_hidden_states=lambda b, g: noise(g, b, 5, 12).repeat_interleave(3, dim=0),
    ),
    "UNetSpatioTemporalConditionModel": dict(
        **unet("SpatioTemporal"), block_out_channels=(32, 64), num_attention_heads=(2, 4), addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24, num_frames=3, in_channels=8, sample=(3, 8, 8, 8),
        encoder_hidden_states=(1, 12), added_time_ids=lambda b, g: torch.tensor([[6.0, 127.0, 0.02]] * b),
    ),
}  # fmt: skip
