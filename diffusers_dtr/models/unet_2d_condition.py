"""The text-conditional U-Net of Stable Diffusion 1, 2 and XL with routed residual units."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config

from .routed_unet import RoutedUNetMixin


class DTRUNet2DConditionModel(RoutedUNetMixin, UNet2DConditionModel):
    r"""A text-conditional U-Net with Denoising Task Routing (arXiv 2310.07138).

    Every entry of a block's `resnets` and `attentions` has its residual branch masked, while its shortcut is not:
    y = shortcut(x) + F(m ⊙ x). Each width has its own window; a decoder block's input, concatenated with the skip
    connection, is routed on its full width. The authors of DTR released no U-Net: this reading of the method is ours.

    Parameters:
        sample_size, ...: All config values of [`~diffusers.UNet2DConditionModel`].
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
        TypeError: For a block type whose units cannot be routed, such as those of K-diffusion.
    """

    plain_class = UNet2DConditionModel

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: tuple[str, ...] = (
            "UpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
        ),
        only_cross_attention: bool | tuple[bool] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int | tuple[int] = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        dropout: float = 0.0,
        act_fn: str = "silu",
        norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | tuple[int] = 1280,
        transformer_layers_per_block: int | tuple[int] | tuple[tuple] = 1,
        reverse_transformer_layers_per_block: tuple[tuple[int]] | None = None,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | tuple[int] = 8,
        num_attention_heads: int | tuple[int] | None = None,
        dual_cross_attention: bool = False,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        resnet_skip_time_act: bool = False,
        resnet_out_scale_factor: float = 1.0,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        time_embedding_act_fn: str | None = None,
        timestep_post_act: str | None = None,
        time_cond_proj_dim: int | None = None,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        projection_class_embeddings_input_dim: int | None = None,
        attention_type: str = "default",
        class_embeddings_concat: bool = False,
        mid_block_only_cross_attention: bool | None = None,
        cross_attention_norm: str | None = None,
        addition_embed_type_num_heads: int = 64,
        routing_alpha: float = 4.0,
        routing_beta: float = 0.8,
        routing_type: str = "dtr",
        routing_seed: int = 0,
        routing_timestep_range: Sequence[float] | None = None,
    ):
        # Every routed width is one of these, or a sum of them.
        self._init_routing(set(block_out_channels))
        super().__init__(**self._plain_config())
        self._route_units()

    @wraps(UNet2DConditionModel.forward, assigned=())
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float, *args, **kwargs):
        """Denoise as the base class does, with its arguments; the routing follows `timestep`."""
        with self._routed(timestep, sample):
            return super().forward(sample, timestep, *args, **kwargs)
