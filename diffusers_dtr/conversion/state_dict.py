"""Conversion of state dicts of the original DiT, DTR and ANT code to [`DTRTransformer2DModel`], and back."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import accelerate
import torch

from ..config_types import built_from_file
from ..models.dit import DTRTransformer2DModel
from ..models.presets import DIT_PRESETS
from .masks import MASK_BUFFER, mask_table, read_mask_tables


# Modules of the original code, and those here that hold their rows.
_BLOCK_NAMES = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm1.linear",),
}
_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "emb.class_embedder.embedding_table",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}

# The original's weight averaging works on the fixed table too: x <- 0.9999 x + 0.0001 p in float32 comes to rest at up
# to 1.7e-4 from p. The table is part of the model's definition, so the exact one is used.
_POSITION_TOLERANCE = 1e-3

# What the original's code has written into it, and its state dicts cannot say otherwise.
_FIXED = {
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "freq_shift": 0,
}


def convert_original_dit(
    state_dict: Mapping[str, torch.Tensor],
    num_attention_heads: int | None = None,
    *,
    class_dropout_prob: float | None = None,
    **config,
) -> DTRTransformer2DModel:
    """Convert a state dict of the original DiT, DTR or ANT code to a model.

    The architecture and the null class come from the shapes, the routing from the mask buffers of DTR checkpoints. A
    checkpoint without any is taken for one of the unrouted code.

    Args:
        state_dict: Weights under the original's names, `x_embedder.proj.weight` and so on.
        num_attention_heads: Number of heads, which shapes do not show. Defaults to that of the published
            model of this depth and width (6, 12, 16, 16 for S, B, L, XL).
        class_dropout_prob: Probability of dropping a label. The last row of the label table is the null class where it
            is above 0. Defaults to 0.1, or to 0 for a table of a single row.
        **config: Config values of [`DTRTransformer2DModel`] that a checkpoint may not hold, such as `routing_beta`
            (1 by default without masks). They have to agree with the masks, if there are any.

    Returns:
        The model, in eval mode, with the original's epsilon (1e-6) and frequencies (`freq_shift=0`).

    Raises:
        ValueError: If a tensor is missing, unknown or of a shape that does not fit, the position table is not the
            fixed one, the number of heads is not known, or the masks are not those of the routing.
    """
    weights = dict(state_dict)
    masks = [weights.pop(key) for key in state_dict if key.endswith(f".{MASK_BUFFER}")]
    routing = read_mask_tables(masks, config) if masks else {"routing_beta": config.get("routing_beta", 1.0)}
    config = {**_infer_config(weights, num_attention_heads, class_dropout_prob), **config, **routing}
    width, num_layers = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    if masks and (masks[0].shape[1], len(masks)) != (width, num_layers):
        raise ValueError(
            f"`state_dict` must have masks of {width} channels for {num_layers} blocks, got "
            f"{masks[0].shape[1]} channels for {len(masks)} blocks."
        )
    with accelerate.init_empty_weights():
        model = DTRTransformer2DModel(**config)
    expected = model.pos_embed.pos_embed
    table = weights.pop("pos_embed", expected)
    if table.shape != expected.shape or (table.float() - expected).abs().max() > _POSITION_TOLERANCE:
        raise ValueError(
            "`pos_embed` must be the fixed sine-cosine table of a square grid of shape "
            f"{tuple(expected.shape)}; this one, of shape {tuple(table.shape)}, holds other values."
        )
    converted = {}
    for theirs, ours, kind in _parameters(num_layers):
        if f"{theirs}.{kind}" in weights:
            parts = torch.atleast_1d(weights.pop(f"{theirs}.{kind}")).tensor_split(len(ours))
            # Copies, also because query, key and value would otherwise share memory, which safetensors cannot save.
            converted |= {f"{name}.{kind}": part.clone() for name, part in zip(ours, parts, strict=True)}
    if weights:
        raise ValueError(f"`state_dict` has a tensor that an original DiT does not have: `{next(iter(weights))}`.")
    with built_from_file("A DTRTransformer2DModel"):
        model.load_state_dict(converted, strict=True, assign=True)
    return model.eval()


def _infer_config(
    weights: Mapping[str, torch.Tensor], num_attention_heads: int | None, class_dropout_prob: float | None
) -> dict[str, Any]:
    width, in_channels, patch_size, _ = _shape(weights, "x_embedder.proj.weight", 4)
    blocks = {int(match[1]) for match in (re.match(r"blocks\.(\d+)\.", name) for name in weights) if match}
    num_layers = 1 + max(blocks, default=-1)
    if len(blocks) != num_layers:  # of which there may be millions, before one is missed
        raise ValueError(f"`state_dict` must have blocks 0 to {num_layers - 1}, got {len(blocks)} of them.")
    if num_attention_heads is None:
        published = {
            (preset["num_layers"], preset["num_attention_heads"] * preset["attention_head_dim"]): preset
            for preset in DIT_PRESETS.values()
        }
        if (num_layers, width) not in published:
            raise ValueError(
                f"`num_attention_heads` must be given: {num_layers} blocks of width {width} are of no published model."
            )
        num_attention_heads = published[num_layers, width]["num_attention_heads"]
    if num_attention_heads < 1 or width % num_attention_heads:
        raise ValueError(f"`num_attention_heads` must divide the width {width}, got {num_attention_heads!r}.")
    hidden_width = _shape(weights, "blocks.0.mlp.fc1.weight", 2)[0]
    if hidden_width != 4 * width:
        raise ValueError(f"`blocks.0.mlp.fc1.weight` must have 4 x {width} rows (mlp_ratio 4), got {hidden_width}.")
    table_rows = _shape(weights, "y_embedder.embedding_table.weight", 2)[0]
    if class_dropout_prob is None:
        class_dropout_prob = 0.1 if table_rows > 1 else 0.0
    config = {
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": width // num_attention_heads,
        "in_channels": in_channels,
        "out_channels": _shape(weights, "final_layer.linear.weight", 2)[0] // patch_size**2,
        "num_layers": num_layers,
        "patch_size": patch_size,
        "attention_bias": "blocks.0.attn.qkv.bias" in weights,
        "num_embeds_ada_norm": table_rows - 1 if class_dropout_prob > 0 else table_rows,
        "class_dropout_prob": class_dropout_prob,
        **_FIXED,
    }
    if "pos_embed" in weights:
        config["sample_size"] = math.isqrt(_shape(weights, "pos_embed", 3)[1]) * patch_size
    return config


def _shape(weights: Mapping[str, torch.Tensor], name: str, num_dimensions: int) -> torch.Size:
    if name not in weights:
        raise ValueError(f"`state_dict` must be that of an original DiT, but it has no `{name}`.")
    shape = weights[name].shape
    if len(shape) != num_dimensions or 0 in shape:
        raise ValueError(f"`{name}` must have {num_dimensions} dimensions above 0, got shape {tuple(shape)}.")
    return shape


def _parameters(num_layers: int) -> Iterator[tuple[str, list[str], str]]:
    """Modules of the original code, those here that hold their rows, and each kind of parameter that they may have."""
    modules = [(theirs, [ours]) for theirs, ours in _NAMES.items()]
    for block in range(num_layers):
        for theirs, ours in _BLOCK_NAMES.items():
            modules.append((f"blocks.{block}.{theirs}", [f"transformer_blocks.{block}.{name}" for name in ours]))
    return ((theirs, ours, kind) for theirs, ours in modules for kind in ("weight", "bias"))


def original_dit_state_dict(model: DTRTransformer2DModel) -> dict[str, torch.Tensor]:
    """Convert a model to a state dict of the original code: the inverse of [`convert_original_dit`].

    A routed model's has the mask buffers of DTR's code and loads there; an unrouted one's loads in that of DiT and
    ANT. Converting it again gives the same weights, to the bit. What a state dict does not hold has to be known to
    whoever loads it: the number of heads, and whether the last row of the label table is the null class.

    Args:
        model: A class-conditional model with the original's conventions, such as a converted one or one made by
            `from_preset`.

    Returns:
        The weights, which share memory with the model's where they are stored alike, the position table and the masks,
        all of the dtype of the weights but for the masks, which are float32.

    Raises:
        ValueError: If the model's config has a value that the original's code cannot have; it names that.
    """
    routing, num_layers = model.routing, model.config.num_layers
    is_routed = routing.routing_type != "none" and routing.beta < 1
    _check_expressible(model, is_routed)
    weights = model.state_dict()
    state_dict = {"pos_embed": model.pos_embed.pos_embed.to(model.dtype)}
    for theirs, ours, kind in _parameters(num_layers):
        parts = [weights.pop(f"{name}.{kind}") for name in ours if f"{name}.{kind}" in weights]
        if parts:
            state_dict[f"{theirs}.{kind}"] = parts[0] if len(parts) == 1 else torch.cat(parts)
    if weights:
        raise ValueError(
            f"`model` must have the weights of an original DiT alone, but it has `{next(iter(weights))}`."
        )
    if is_routed:  # one table for all blocks, which `torch.save` writes once
        table = mask_table(int(routing.timestep_range[1]) + 1, model.inner_dim, routing.alpha, routing.beta)
        state_dict |= {f"blocks.{block}.{MASK_BUFFER}": table for block in range(num_layers)}
    return state_dict


def _check_expressible(model: DTRTransformer2DModel, is_routed: bool) -> None:
    config, kind, (low, high) = model.config, model.routing.routing_type, model.routing.timestep_range
    unknown = [
        f"`{name}`={value!r} only, got a model with {config[name]!r}"
        for name, value in _FIXED.items()
        if config[name] != value
    ]
    if config.num_embeds_ada_norm is None:
        unknown.append("no model without classes, got `num_embeds_ada_norm`=None")
    if is_routed and (kind != "dtr" or low != 0 or high != int(high)):
        unknown.append(
            '`routing_type`="dtr" and a `routing_timestep_range` from 0 to an integer only, got a model with '
            f"{kind!r} and {(low, high)}"
        )
    if unknown:
        raise ValueError(
            f"The original's code has {unknown[0]}. Use this model as the pipeline that it is; for the original's "
            "code, train one with its values from the start, as `--model_preset` and "
            "`DTRTransformer2DModel.from_preset` have them."
        )
