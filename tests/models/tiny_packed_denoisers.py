"""Tiny denoisers of images that are packed into tokens: 4 x 3 of them with 8 channels. Captions have 5 tokens."""

# ruff: noqa: C408
from __future__ import annotations

import torch
from tiny_shapes import TinyDenoiser, between, lengths_differ, noise, positions


STREAM = dict(in_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2)
IDS = dict(img_ids=positions(1, 4, 3), txt_ids=torch.zeros(5, 3))


def packed(b, g):
    return dict(hidden_states=noise(g, b, 12, 8), encoder_hidden_states=noise(g, b, 5, 12))


PACKED_DENOISERS = {
    "BriaFiboTransformer2DModel": TinyDenoiser(
        dict(**STREAM, num_single_layers=2, joint_attention_dim=12, axes_dims_rope=[4, 4, 8], text_encoder_dim=10),
        lambda b, g: dict(
            **packed(b, g),
            text_encoder_layers=[noise(g, b, 5, 10) for _ in range(4)],
            timestep=between(g, b, 0, 1000),
            **IDS,
        ),
    ),
    "BriaTransformer2DModel": TinyDenoiser(
        dict(**STREAM, num_single_layers=2, joint_attention_dim=12, axes_dims_rope=[4, 4, 8]),
        lambda b, g: dict(
            **packed(b, g),
            timestep=between(g, b, 0, 1000),
            **IDS,
        ),
    ),
    "ChromaTransformer2DModel": TinyDenoiser(
        dict(
            **STREAM, num_single_layers=2, joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
            approximator_num_channels=16, approximator_hidden_dim=24, approximator_layers=1,
        ),
        lambda b, g: dict(
            **packed(b, g),
            timestep=between(g, b, 0, 1),
            **IDS,
        ),
    ),
    "Flux2Transformer2DModel": TinyDenoiser(
        dict(
            **STREAM, num_single_layers=2, joint_attention_dim=12, timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        lambda b, g: dict(
            **packed(b, g),
            timestep=between(g, b, 0, 1),
            img_ids=positions(1, 4, 3, 1),
            txt_ids=positions(1, 1, 1, 5),
            guidance=torch.full((b,), 4.0),
        ),
    ),
    "Flux3Transformer2DModel": TinyDenoiser(
        dict(
            **STREAM, cond_in_channels=6, num_single_layers=2, joint_attention_dim=12, timestep_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        lambda b, g: dict(
            **packed(b, g),
            timestep=between(g, b, 0, 1),
            img_ids=positions(1, 4, 3, 1),
            txt_ids=positions(1, 1, 1, 5),
        ),
    ),
    "FluxTransformer2DModel": TinyDenoiser(
        dict(
            **STREAM, num_single_layers=2, joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        lambda b, g: dict(
            **packed(b, g),
            pooled_projections=noise(g, b, 10),
            timestep=between(g, b, 0, 1),
            **IDS,
            guidance=torch.full((b,), 3.5),
        ),
    ),
    "Ideogram4Transformer2DModel": TinyDenoiser(
        dict(**STREAM, intermediate_size=48, adaln_dim=10, llm_features_dim=12, mrope_section=(4, 2, 2)),
        # The pipeline packs [caption, image]; 3 marks tokens of the caption, 2 tokens of the image.
        lambda b, g: dict(
            hidden_states=torch.cat([torch.zeros(b, 5, 8), noise(g, b, 12, 8)], dim=1),
            timestep=between(g, b, 0, 1),
            encoder_hidden_states=torch.cat([noise(g, b, 5, 12), torch.zeros(b, 12, 12)], dim=1),
            position_ids=torch.cat([torch.arange(5).repeat(3, 1).T, positions(1, 4, 3).long() + 5]).repeat(b, 1, 1),
            segment_ids=torch.ones(b, 17, dtype=torch.long),
            indicator=torch.tensor([3] * 5 + [2] * 12).repeat(b, 1),
        ),
    ),
    "JoyImageEditPlusTransformer3DModel": TinyDenoiser(
        dict(
            in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=12, num_layers=2, rope_dim_list=[4, 4, 8],
        ),
        # A sequence of patches: the image that is being made and a smaller one that it is made after.
        lambda b, g: dict(
            hidden_states=noise(g, b, 16, 4, 1, 2, 2),
            timestep=between(g, b, 0, 1000),
            encoder_hidden_states=noise(g, b, 5, 12),
            encoder_hidden_states_mask=lengths_differ(b, 5),
            shape_list=[[(1, 4, 3), (1, 2, 2)]] * b,
        ),
    ),
    "Krea2Transformer2DModel": TinyDenoiser(
        dict(
            **STREAM, num_key_value_heads=1, intermediate_size=48, timestep_embed_dim=16, text_hidden_dim=12,
            num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=16,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 8),
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 12, 8),
            encoder_hidden_states=noise(g, b, 5, 2, 12),
            timestep=between(g, b, 0, 1),
            position_ids=torch.cat([torch.zeros(5, 3), positions(1, 4, 3)]),
            encoder_attention_mask=lengths_differ(b, 5),
        ),
    ),
    "LongCatImageTransformer2DModel": TinyDenoiser(
        dict(
            **STREAM, num_single_layers=2, joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=[4, 4, 8],
        ),
        lambda b, g: dict(
            **packed(b, g),
            timestep=between(g, b, 0, 1),
            **IDS,
        ),
    ),
    "NucleusMoEImageTransformer2DModel": TinyDenoiser(
        dict(
            **STREAM, out_channels=2, joint_attention_dim=12, axes_dims_rope=(4, 4, 8), dense_moe_strategy="all_moe",
            num_experts=2, moe_intermediate_dim=16, capacity_factors=1.0,
        ),
        lambda b, g: dict(
            hidden_states=noise(g, b, 12, 8),
            img_shapes=[(1, 4, 3)] * b,
            encoder_hidden_states=noise(g, b, 5, 12),
            encoder_hidden_states_mask=lengths_differ(b, 5),
            timestep=between(g, b, 0, 1),
        ),
    ),
    "OvisImageTransformer2DModel": TinyDenoiser(
        dict(**STREAM, out_channels=8, num_single_layers=2, joint_attention_dim=12, axes_dims_rope=(4, 4, 8)),
        lambda b, g: dict(
            **packed(b, g),
            timestep=between(g, b, 0, 1),
            **IDS,
        ),
    ),
    "QwenImage21Transformer2DModel": TinyDenoiser(
        dict(**STREAM, out_channels=8, context_in_dim=12, axes_dims_rope=(4, 4, 8)),
        # Each place that is marked as the image's stands for 2 x 2 tokens.
        lambda b, g: dict(
            hidden_states=noise(g, b, 16, 8),
            encoder_hidden_states=noise(g, b, 5, 12),
            timestep=between(g, b, 0, 1),
            img_shapes=[[(1, 4, 4)]] * b,
            img_mask=torch.tensor([False] * 5 + [True] * 4).repeat(b, 1),
            encoder_hidden_states_mask=lengths_differ(b, 5),
        ),
    ),
    "QwenImageTransformer2DModel": TinyDenoiser(
        dict(**STREAM, out_channels=2, joint_attention_dim=12, axes_dims_rope=(4, 4, 8)),
        lambda b, g: dict(
            **packed(b, g),
            encoder_hidden_states_mask=lengths_differ(b, 5),
            timestep=between(g, b, 0, 1),
            img_shapes=[[(1, 4, 3)]] * b,
        ),
    ),
}  # fmt: skip
