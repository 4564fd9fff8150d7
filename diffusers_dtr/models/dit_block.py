"""The parts of a DiT (arXiv 2212.09748, adaLN-Zero): its routed block, what conditions it, and how it begins."""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import LabelEmbedding, TimestepEmbedding, Timesteps
from diffusers.models.normalization import AdaLayerNormZero
from torch import nn

from ..routing import routed_residual


# `Transformer2DModel` is what configs from before diffusers 0.28 say, facebook/DiT-XL-2-256 among them.
PER_BLOCK_CLASS_NAMES = ("DiTTransformer2DModel", "Transformer2DModel")

_EMBEDDER = re.compile(r"transformer_blocks\.(\d+)\.norm1\.emb\.(.+)")


class TimestepLabelEmbedding(nn.Module):
    """The sum of the embeddings of a timestep and, if there are classes, a label, which is dropped at random."""

    def __init__(self, embedding_dim: int, num_classes: int | None, class_dropout_prob: float, freq_shift: int):
        super().__init__()
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=freq_shift)
        self.timestep_embedder = TimestepEmbedding(256, embedding_dim)
        self.class_embedder = (
            None if num_classes is None else LabelEmbedding(num_classes, embedding_dim, class_dropout_prob)
        )

    def forward(
        self, timestep: torch.Tensor, class_labels: torch.Tensor | None, hidden_dtype: torch.dtype
    ) -> torch.Tensor:
        """Embed `(batch,)` timesteps and labels as `(batch, embedding_dim)`."""
        embedding = self.timestep_embedder(self.time_proj(timestep).to(dtype=hidden_dtype))
        return embedding if self.class_embedder is None else embedding + self.class_embedder(class_labels)


class DTRTransformerBlock(nn.Module):
    """A DiT block (adaLN-Zero) that is routed as a whole: attention and MLP both work on the masked stream."""

    def __init__(self, dim: int, config: FrozenDict):
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim)
        heads = {"heads": config.num_attention_heads, "dim_head": config.attention_head_dim}
        options = {"bias": config.attention_bias, "upcast_attention": config.upcast_attention}
        self.attn1 = Attention(query_dim=dim, dropout=config.dropout, **heads, **options)
        self.norm3 = nn.LayerNorm(dim, config.norm_eps, config.norm_elementwise_affine)
        self.ff = FeedForward(dim, dropout=config.dropout, activation_fn=config.activation_fn)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        mask: torch.Tensor | None,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Transform `(batch, tokens, dim)`, with conditioning `(batch, dim)` and a mask `(batch, 1, dim)` or None."""
        return routed_residual(self._transform, hidden_states, mask, conditioning, cross_attention_kwargs or {})

    def _transform(self, hidden_states, conditioning, cross_attention_kwargs):
        normed, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=conditioning)
        attended = self.attn1(normed, **cross_attention_kwargs)
        hidden_states = gate_msa.unsqueeze(1) * attended + hidden_states
        normed = self.norm3(hidden_states) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        return gate_mlp.unsqueeze(1) * self.ff(normed) + hidden_states


def unpatchify(tokens: torch.Tensor, height: int, width: int, patch_size: int) -> torch.Tensor:
    """Images of patches `(batch, height * width, patch_size * patch_size * channels)`, channels innermost."""
    patches = tokens.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (height, width))
    return torch.einsum("nhwpqc->nchpwq", patches).flatten(4, 5).flatten(2, 3)


def initialize_dit(model: ModelMixin) -> None:
    """Initialise as the original does (arXiv 2212.09748, Section 3.2, adaLN-Zero): blocks begin as the identity."""
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
    for parameter in model.emb.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    nn.init.constant_(model.proj_out_1.weight, 0)
    nn.init.constant_(model.proj_out_2.weight, 0)


def share_embedders(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace the embedders, which diffusers' DiT repeats in all blocks, by one, under the name `emb`."""
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
                "conditioning once needs a checkpoint in which they are identical, as in the published DiT weights."
            )
    return shared
