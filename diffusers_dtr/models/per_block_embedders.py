"""diffusers' DiT repeats the timestep and label embedder in every block; this reads such weights as one embedder."""

from __future__ import annotations

import re

import torch


# `Transformer2DModel` is what configs from before diffusers 0.28 say, facebook/DiT-XL-2-256 among them.
PER_BLOCK_CLASS_NAMES = ("DiTTransformer2DModel", "Transformer2DModel")

_EMBEDDER = re.compile(r"transformer_blocks\.(\d+)\.norm1\.emb\.(.+)")


def share_embedders(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace the embedders of all blocks by one, under the name `emb`.

    Args:
        state_dict: Weights of a [`~diffusers.DiTTransformer2DModel`].

    Returns:
        The same tensors under the names of [`DTRTransformer2DModel`].

    Raises:
        ValueError: If a block's embedder is not identical to the first block's; it names the block and the tensor.
    """
    shared = {}
    for key, value in state_dict.items():
        match = _EMBEDDER.fullmatch(key)
        if match is None:
            shared[key] = value
            continue
        block, name = match.groups()
        first = shared.setdefault(f"emb.{name}", value)
        if not torch.equal(first, value):
            raise ValueError(
                f"The embedder of block {block} differs from that of block 0 in `{name}`. A model that embeds its "
                "conditioning once cannot represent a checkpoint in which diffusers' per-block embedders were trained "
                "apart; use one in which they are identical, as in the published DiT weights."
            )
    return shared
