"""Every denoiser of diffusers that is routed, in a size that takes milliseconds: configurations and inputs by rule."""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from tiny_families import FAMILIES, lengths_differ, noise, positions

from diffusers_dtr.models.families import TRANSFORMERS, UNETS


# Flex attention takes seconds on a CPU, and has no backward there.
FLEX_ATTENTION = {"Kandinsky6SRTransformer3DModel"}

_SMALL = {
    **dict.fromkeys(("attention_head_dim", "freq_dim", "rope_max_seq_len"), 16),
    **dict.fromkeys(("num_attention_heads", "num_layers", "num_single_layers"), 2),
    **dict.fromkeys(("num_refiner_layers", "layers_per_block"), 1),
    **dict.fromkeys(("in_channels", "out_channels", "sample_height"), 4),
    **dict.fromkeys(("joint_attention_dim", "text_embed_dim", "text_dim", "context_in_dim", "cap_feat_dim"), 12),
    **dict.fromkeys(("sample_size", "condition_dim", "pos_embed_max_size"), 8),
    **dict.fromkeys(("hidden_size", "caption_projection_dim", "cross_attention_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 48),
    **dict.fromkeys(("axes_dims_rope", "axes_dims", "rope_axes_dim"), (4, 4, 8)),
    "block_out_channels": (16, 32),
    "caption_channels": 12,
    "pooled_projection_dim": 10,
    "sample_width": 6,
    "time_embed_dim": 14,
}
_INPUTS = {
    "hidden_states": (4, 8, 6),
    "sample": (4, 8, 8),
    "encoder_hidden_states": (5, 12),
    "encoder_hidden_states_2": (3, 10),
    "pooled_projections": (10,),
    "audio_hidden_states": (7, 6),
    "img_ids": positions(1, 4, 3),
    "txt_ids": torch.zeros(5, 3),
    **dict.fromkeys(
        ("encoder_attention_mask", "encoder_hidden_states_mask", "encoder_mask"), lambda b, g: lengths_differ(b)
    ),
    "encoder_attention_mask_2": lambda b, g: lengths_differ(b, 3),
    **dict.fromkeys(("original_size", "target_size"), lambda b, g: torch.tensor([[64.0, 48.0]] * b)),
    "crop_coords": lambda b, g: torch.zeros(b, 2),
    **{"num_frames": 2, "height": 2, "width": 3},
}


def tiny_config(name: str) -> dict[str, Any]:
    """Arguments of a class's constructor."""
    parameters = signature(getattr(diffusers, name)).parameters
    return {key: value for key, value in {**_SMALL, **FAMILIES[name]}.items() if key in parameters}


def build(name: str, seed: int = 0, **config) -> ModelMixin:
    """The plain model in evaluation mode, with parameters that let the blocks reach the output.

    Many families start with output layers of zeros, and some leave memory as it is. Values in `config` take the place
    of the tiny configuration's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(diffusers, name)(**{**tiny_config(name), **config})
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def inputs(name: str, batch: int = 2, seed: int = 0) -> dict:
    """Keyword arguments for `forward`, as the family's pipeline passes them."""
    generator, plain = torch.Generator().manual_seed(seed), getattr(diffusers, name)
    constructor, forward = signature(plain).parameters, signature(plain.forward).parameters
    family = {**TRANSFORMERS, **UNETS}[name]
    own = {key: value for key, value in FAMILIES[name].items() if key not in constructor}
    made = {}
    for key, value in {**_INPUTS, family.timestep: (), **own}.items():
        if key not in forward or value is None:
            continue
        if callable(value):
            value = value(batch, generator)
        elif key == family.timestep:
            defaults = {k: p.default for k, p in constructor.items() if p.default is not Parameter.empty}
            low, high = family.range_of({**defaults, **tiny_config(name)})
            value = low + (high - low) * torch.rand(batch, *value, generator=generator)
        elif isinstance(value, tuple):
            value = noise(generator, batch, *value)
        made[key] = value
    return made


def run(model: ModelMixin, inputs: dict) -> torch.Tensor:
    """The image, video or sound that the model predicts."""
    output = model(**inputs)[0]
    return torch.stack(output) if isinstance(output, list) else output
