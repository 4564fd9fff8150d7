"""The multimodal transformer of Stable Diffusion 3 (arXiv 2403.03206) with routed image streams."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps

import torch
from diffusers import SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import JointTransformerBlock

from .routing_scope import RoutedTransformerMixin, route_image_tokens


class RoutedJointTransformerBlock(JointTransformerBlock):
    """A block that is routed as a whole: its image stream is masked, its text stream is not."""

    @wraps(JointTransformerBlock.forward, assigned=())
    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        """Call the base class's block with the active channels of `(batch, tokens, width)`."""
        return route_image_tokens(super().forward, hidden_states, *args, **kwargs)


class DTRSD3Transformer2DModel(RoutedTransformerMixin, SD3Transformer2DModel):
    r"""A Stable Diffusion 3 transformer with Denoising Task Routing (arXiv 2310.07138).

    Each block sees the window of image channels that belongs to the timestep; the text stream is not routed. Its
    pipelines pass timesteps σ · 1000, up to 1000.0, which is beyond the default range and counts as its end. The
    authors of DTR released no text-to-image code: this reading of the method is ours.

    Parameters:
        sample_size, ...: All config values of [`~diffusers.SD3Transformer2DModel`].
        routing_alpha (`float`, defaults to 4.0): How late the channel windows start to slide, > 0.
        routing_beta (`float`, defaults to 0.8): Share of the channels that are active, in (0, 1]; 1 is the unrouted
            model, to the bit.
        routing_type (`str`, defaults to `"dtr"`): `"dtr"`, `"random"` (the paper's baseline) or `"none"`.
        routing_seed (`int`, defaults to 0): Seed of random routing.
        routing_timestep_range (`tuple[float, float]`, *optional*): The timesteps between which the windows slide.
            Defaults to (0, 999).

    Raises:
        ValueError: For a routing that does not exist (see [`~diffusers_dtr.routing.check_routing`]), before any
            memory is spent.
    """

    plain_class = SD3Transformer2DModel
    routed_blocks = (RoutedJointTransformerBlock,)
    _no_split_modules = ("RoutedJointTransformerBlock",)
    _repeated_blocks = ("RoutedJointTransformerBlock",)

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        routing_alpha: float = 4.0,
        routing_beta: float = 0.8,
        routing_type: str = "dtr",
        routing_seed: int = 0,
        routing_timestep_range: Sequence[float] | None = None,
    ):
        self._init_routing({num_attention_heads * attention_head_dim})
        super().__init__(**self._plain_config())
        self._route_blocks()

    @wraps(SD3Transformer2DModel.forward, assigned=())
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states=None,
        pooled_projections=None,
        timestep=None,
        *args,
        **kwargs,
    ):
        """Denoise as the base class does, with its arguments; the routing follows `timestep`."""
        with self._routed(timestep, hidden_states):
            return super().forward(hidden_states, encoder_hidden_states, pooled_projections, timestep, *args, **kwargs)
