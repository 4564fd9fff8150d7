"""The block of a DiT (arXiv 2212.09748, adaLN-Zero), routed as a whole, and the embedding that conditions it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import LabelEmbedding, TimestepEmbedding, Timesteps
from diffusers.models.normalization import AdaLayerNormZero
from torch import nn

from ..routing import routed_residual


class TimestepLabelEmbedding(nn.Module):
    """The sum of a timestep's and a class label's embedding, with labels dropped at random in training mode.

    Args:
        embedding_dim: Width of the embedding.
        num_classes: Number of classes, or None for a model without labels.
        class_dropout_prob: Probability with which a sample's label becomes the null class in training mode.
        freq_shift: Sinusoid frequencies are 10000 ** (-i / (128 - freq_shift)).
    """

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

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        dropout: float,
        attention_bias: bool,
        activation_fn: str,
        upcast_attention: bool,
        norm_elementwise_affine: bool,
        norm_eps: float,
    ):
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim)
        self.attn1 = Attention(
            query_dim=dim,
            heads=num_attention_heads,
            dim_head=attention_head_dim,
            dropout=dropout,
            bias=attention_bias,
            upcast_attention=upcast_attention,
        )
        self.norm3 = nn.LayerNorm(dim, norm_eps, norm_elementwise_affine)
        self.ff = FeedForward(dim, dropout=dropout, activation_fn=activation_fn)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        mask: torch.Tensor | None,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Route and transform the tokens.

        Args:
            hidden_states: `(batch, tokens, dim)`.
            conditioning: `(batch, dim)`.
            mask: Bool `(batch, 1, dim)`, or None for the unrouted block.
            cross_attention_kwargs: Passed on to the attention processor.

        Returns:
            `(batch, tokens, dim)`.
        """
        return routed_residual(self._transform, hidden_states, mask, conditioning, cross_attention_kwargs or {})

    def _transform(self, hidden_states, conditioning, cross_attention_kwargs):
        normed, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=conditioning)
        attended = self.attn1(normed, **cross_attention_kwargs)
        hidden_states = gate_msa.unsqueeze(1) * attended + hidden_states
        normed = self.norm3(hidden_states) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        return gate_mlp.unsqueeze(1) * self.ff(normed) + hidden_states


def unpatchify(tokens: torch.Tensor, height: int, width: int, patch_size: int) -> torch.Tensor:
    """Images of tokens, each of which is a patch.

    Args:
        tokens: `(batch, height * width, patch_size * patch_size * channels)`, row by row, channels innermost.
        height: Patches from top to bottom.
        width: Patches from left to right.
        patch_size: Side of a patch.

    Returns:
        `(batch, channels, height * patch_size, width * patch_size)`.
    """
    patches = tokens.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (height, width))
    return torch.einsum("nhwpqc->nchpwq", patches).flatten(4, 5).flatten(2, 3)
