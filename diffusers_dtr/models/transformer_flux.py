"""The multimodal transformer of Flux.1 with routed image streams."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

from .routing_scope import RoutedTransformerMixin, route_image_tokens


class RoutedFluxTransformerBlock(FluxTransformerBlock):
    """A block that is routed as a whole: its image stream is masked, its text stream is not."""

    @wraps(FluxTransformerBlock.forward, assigned=())
    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        """Call the base class's block with the active channels of `(batch, tokens, width)`."""
        return route_image_tokens(super().forward, hidden_states, *args, **kwargs)


class RoutedFluxSingleTransformerBlock(FluxSingleTransformerBlock):
    """A block that is routed as a whole: its image stream is masked, its text stream is not."""

    @wraps(FluxSingleTransformerBlock.forward, assigned=())
    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        """Call the base class's block with the active channels of `(batch, tokens, width)`."""
        return route_image_tokens(super().forward, hidden_states, *args, **kwargs)


class DTRFluxTransformer2DModel(RoutedTransformerMixin, FluxTransformer2DModel):
    r"""A Flux transformer with Denoising Task Routing (arXiv 2310.07138).

    Each block, of two streams or of one, sees the window of image channels that belongs to the timestep; text tokens
    are not routed. The authors of DTR released no text-to-image code: this reading of the method is ours.

    Parameters:
        patch_size, ...: All config values of [`~diffusers.FluxTransformer2DModel`].
        routing_alpha (`float`, defaults to 4.0): How late the channel windows start to slide, > 0.
        routing_beta (`float`, defaults to 0.8): Share of the channels that are active, in (0, 1]; 1 is the unrouted
            model, to the bit.
        routing_type (`str`, defaults to `"dtr"`): `"dtr"`, `"random"` (the paper's baseline) or `"none"`.
        routing_seed (`int`, defaults to 0): Seed of random routing.
        routing_timestep_range (`tuple[float, float]`, *optional*, defaults to (0.0, 1.0)): The timesteps between
            which the windows slide. Flux is called with σ itself, which its pipelines get from timestep / 1000. None
            means (0, 999), as in the other routed models.

    Raises:
        ValueError: For a routing that does not exist (see [`~diffusers_dtr.routing.check_routing`]), before any
            memory is spent.
    """

    plain_class = FluxTransformer2DModel
    routed_blocks = (RoutedFluxTransformerBlock, RoutedFluxSingleTransformerBlock)
    _no_split_modules = ("RoutedFluxTransformerBlock", "RoutedFluxSingleTransformerBlock")
    _repeated_blocks = ("RoutedFluxTransformerBlock", "RoutedFluxSingleTransformerBlock")

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        routing_alpha: float = 4.0,
        routing_beta: float = 0.8,
        routing_type: str = "dtr",
        routing_seed: int = 0,
        routing_timestep_range: Sequence[float] | None = (0.0, 1.0),
    ):
        self._init_routing({num_attention_heads * attention_head_dim})
        super().__init__(**self._plain_config())
        self._route_blocks()

    @wraps(FluxTransformer2DModel.forward, assigned=())
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
