"""The text-to-image transformers PixArt-α (arXiv 2310.00426) and PixArt-Σ (arXiv 2403.04692) with routed blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import BasicTransformerBlock

from .routing_scope import RoutedTransformerMixin, route_tokens


class RoutedBasicTransformerBlock(BasicTransformerBlock):
    """A block that is routed as a whole: attention and MLP work on the masked stream."""

    @wraps(BasicTransformerBlock.forward, assigned=())
    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        """Call the base class's block with the active channels of `(batch, tokens, width)`."""
        return route_tokens(super().forward, hidden_states, *args, **kwargs)


class DTRPixArtTransformer2DModel(RoutedTransformerMixin, PixArtTransformer2DModel, PeftAdapterMixin):
    r"""A PixArt transformer with Denoising Task Routing (arXiv 2310.07138).

    Each block sees the window of image channels that belongs to the timestep; the text is not routed. The authors of
    DTR released no text-to-image code: this reading of the method is ours. Unlike the base class it takes LoRA
    adapters directly (`add_adapter`, `load_lora_adapter`).

    Parameters:
        num_attention_heads, ...: All config values of [`~diffusers.PixArtTransformer2DModel`].
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

    plain_class = PixArtTransformer2DModel
    routed_blocks = (RoutedBasicTransformerBlock,)
    _no_split_modules = ("RoutedBasicTransformerBlock", "PatchEmbed")
    _repeated_blocks = ("RoutedBasicTransformerBlock",)

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = 1152,
        attention_bias: bool = True,
        sample_size: int = 128,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: int | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int | None = None,
        attention_type: str | None = "default",
        routing_alpha: float = 4.0,
        routing_beta: float = 0.8,
        routing_type: str = "dtr",
        routing_seed: int = 0,
        routing_timestep_range: Sequence[float] | None = None,
    ):
        self._init_routing({num_attention_heads * attention_head_dim})
        super().__init__(**self._plain_config())
        self._route_blocks()

    @wraps(PixArtTransformer2DModel.forward, assigned=())
    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states=None, timestep=None, *args, **kwargs):
        """Denoise as the base class does, with its arguments; the routing follows `timestep`."""
        with self._routed(timestep, hidden_states):
            return super().forward(hidden_states, encoder_hidden_states, timestep, *args, **kwargs)
