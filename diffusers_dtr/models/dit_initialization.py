"""How a DiT begins."""

from __future__ import annotations

from diffusers import ModelMixin
from torch import nn


def initialize_dit(model: ModelMixin) -> None:
    """Initialise as the original DiT does (arXiv 2212.09748, Section 3.2, adaLN-Zero); diffusers leaves that out.

    Blocks begin as the identity, and a new model predicts zero.

    Args:
        model: A [`DTRTransformer2DModel`], whose weights are set in place.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.constant_(module.bias, 0)
    for block in model.transformer_blocks:
        # The original's query, key and value are one matrix, whose fan-out is three times as large.
        for projection in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            nn.init.xavier_uniform_(projection.weight, gain=2**-0.5)
        nn.init.constant_(block.norm1.linear.weight, 0)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.flatten(1))
    nn.init.constant_(model.pos_embed.proj.bias, 0)
    nn.init.normal_(model.emb.timestep_embedder.linear_1.weight, std=0.02)
    nn.init.normal_(model.emb.timestep_embedder.linear_2.weight, std=0.02)
    if model.emb.class_embedder is not None:
        nn.init.normal_(model.emb.class_embedder.embedding_table.weight, std=0.02)
    nn.init.constant_(model.proj_out_1.weight, 0)
    nn.init.constant_(model.proj_out_2.weight, 0)
