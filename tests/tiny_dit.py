"""Tiny DiTs, ours and diffusers', with random weights, and inputs for them."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel, ModelMixin

from diffusers_dtr import DTRTransformer2DModel


NUM_CLASSES = 5
CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 8,
    "num_embeds_ada_norm": NUM_CLASSES,
}
TIMESTEPS = torch.tensor([0, 500, 978, 999])


def with_random_weights(model: ModelMixin) -> ModelMixin:
    """Zero-initialised layers would hide most mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model.eval()


def routed_dit(**config) -> DTRTransformer2DModel:
    return with_random_weights(DTRTransformer2DModel(**{**CONFIG, **config}))


def plain_dit(**config) -> DiTTransformer2DModel:
    """With identical embedders in all blocks, as in published checkpoints."""
    model = with_random_weights(DiTTransformer2DModel(**{**CONFIG, **config}))
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def inputs(timestep: torch.Tensor = TIMESTEPS, size: tuple[int, int] = (8, 8)) -> dict[str, torch.Tensor]:
    """Arguments of one forward call for a batch of the timesteps."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(len(timestep), 4, *size, generator=generator),
        "timestep": timestep,
        "class_labels": torch.arange(len(timestep)) % (NUM_CLASSES + 1),
    }


@torch.no_grad()
def output(model: ModelMixin, **arguments) -> torch.Tensor:
    """The prediction for `arguments`, or for `inputs()`."""
    return model(**(arguments or inputs())).sample
