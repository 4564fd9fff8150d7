"""From the state dicts of the original DiT, DTR and ANT code to [`DTRTransformer2DModel`], with the names as data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import accelerate
import torch

from .transformer_dit import DTRTransformer2DModel


_BLOCK_NAMES = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "emb.class_embedder.embedding_table",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")

# DTR's code keeps the table of masks, (timesteps, channels), as a buffer of this name in every block's router.
_MASK_BUFFER = "_unit_mapping"

# The original computes the table in NumPy and stores it as float32.
_POSITION_TOLERANCE = 1e-5


def convert_original_dit(
    state_dict: Mapping[str, torch.Tensor],
    num_attention_heads: int,
    *,
    class_dropout_prob: float | None = None,
    **config,
) -> DTRTransformer2DModel:
    """Build the model of an original DiT, DTR or ANT state dict.

    Depth, widths, patch size, input size, channels, learned variance, classes and null class come from the shapes. The
    mask buffers of DTR checkpoints are not read: the routing is computed from the config.

    Args:
        state_dict: Weights under the original's names, `x_embedder.proj.weight` and so on.
        num_attention_heads: Number of heads, the one thing that shapes do not tell (6, 12, 16, 16 for S, B, L, XL).
        class_dropout_prob: Probability of dropping a label. The last row of the label table is the null class where it
            is above 0. Defaults to 0.1, or to 0 for a table of a single row.
        **config: Config values of [`DTRTransformer2DModel`] that a checkpoint does not hold: `routing_alpha`,
            `routing_beta`, `routing_timestep_range`, ... For weights of the original DiT pass `routing_beta=1.0`, or
            `routing_type="none"`.

    Returns:
        The model, in eval mode, with the original's epsilon (1e-6) and frequencies (`freq_shift=0`).

    Raises:
        ValueError: If a tensor is missing, unknown or of a shape that does not fit, or the position table is not the
            fixed one.
    """
    weights = {key: value for key, value in state_dict.items() if not key.endswith(_MASK_BUFFER)}
    position_table = weights.pop("pos_embed", None)
    config = {**_infer_config(weights, num_attention_heads, class_dropout_prob, position_table), **config}
    with accelerate.init_empty_weights():
        model = DTRTransformer2DModel(**config)
    converted = _rename(weights)
    _check_same_names(converted, model.state_dict())
    if position_table is not None:
        _check_fixed_positions(position_table, model.pos_embed.pos_embed)
    # Copies, also because query, key and value would otherwise share memory, which safetensors cannot save.
    model.load_state_dict({key: value.clone() for key, value in converted.items()}, strict=True, assign=True)
    return model.eval()


def _infer_config(weights, num_attention_heads, class_dropout_prob, position_table) -> dict:
    width, in_channels, patch_size, _ = _shape(weights, "x_embedder.proj.weight")
    if num_attention_heads < 1 or width % num_attention_heads:
        raise ValueError(f"`num_attention_heads` must divide the width {width}, got {num_attention_heads!r}.")
    hidden_width = _shape(weights, "blocks.0.mlp.fc1.weight")[0]
    if hidden_width != 4 * width:
        raise ValueError(f"`blocks.0.mlp.fc1.weight` must have 4 x {width} rows (mlp_ratio 4), got {hidden_width}.")
    table_rows = _shape(weights, "y_embedder.embedding_table.weight")[0]
    if class_dropout_prob is None:
        class_dropout_prob = 0.1 if table_rows > 1 else 0.0
    config = {
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": width // num_attention_heads,
        "in_channels": in_channels,
        "out_channels": _shape(weights, "final_layer.linear.weight")[0] // patch_size**2,
        "num_layers": 1 + max(int(match[1]) for match in map(_BLOCK.fullmatch, weights) if match),
        "patch_size": patch_size,
        "attention_bias": "blocks.0.attn.qkv.bias" in weights,
        "num_embeds_ada_norm": table_rows - 1 if class_dropout_prob > 0 else table_rows,
        "class_dropout_prob": class_dropout_prob,
        "norm_eps": 1e-6,
        "freq_shift": 0,
    }
    if position_table is not None:
        config["sample_size"] = math.isqrt(position_table.shape[1]) * patch_size
    return config


def _shape(weights, name) -> torch.Size:
    if name not in weights:
        raise ValueError(f"`state_dict` must be that of an original DiT, but it has no `{name}`.")
    return weights[name].shape


def _rename(weights) -> dict[str, torch.Tensor]:
    converted = {}
    for key, value in weights.items():
        module, _, kind = key.rpartition(".")
        match = _BLOCK.fullmatch(module)
        prefix, name = (f"transformer_blocks.{match[1]}.", match[2]) if match else ("", module)
        names = _BLOCK_NAMES if match else _NAMES
        if match and name == "attn.qkv":
            for projection, part in zip(_QKV, value.chunk(3), strict=True):
                converted[f"{prefix}{projection}.{kind}"] = part
        elif name in names:
            converted[f"{prefix}{names[name]}.{kind}"] = value
        else:
            raise ValueError(f"`state_dict` has a tensor that an original DiT does not have: `{key}`.")
    return converted


def _check_same_names(converted, expected) -> None:
    for key, value in expected.items():
        if key not in converted:
            raise ValueError(f"`state_dict` lacks the tensor that becomes `{key}`.")
        if converted[key].shape != value.shape:
            raise ValueError(
                f"The tensor that becomes `{key}` must have shape {tuple(value.shape)}, "
                f"got {tuple(converted[key].shape)}."
            )


def _check_fixed_positions(table, expected) -> None:
    if table.shape != expected.shape or (table.float() - expected).abs().max() > _POSITION_TOLERANCE:
        raise ValueError(
            "`pos_embed` must be the fixed sine-cosine table of a square grid of shape "
            f"{tuple(expected.shape)}; this one, of shape {tuple(table.shape)}, holds other values."
        )
