"""The U-Net of DDPM (arXiv 2006.11239) and ADM (arXiv 2105.05233) with routed residual units."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin

from .routed_unet import RoutedUNetMixin


class DTRUNet2DModel(RoutedUNetMixin, UNet2DModel, PeftAdapterMixin):
    r"""A U-Net without text conditioning, with Denoising Task Routing (arXiv 2310.07138).

    Every entry of a block's `resnets` and `attentions` has its residual branch masked, while its shortcut is not:
    y = shortcut(x) + F(m ⊙ x). Each width has its own window; a decoder block's input, concatenated with the skip
    connection, is routed on its full width. The authors of DTR released no U-Net: this reading of the method is ours.
    Unlike the base class it takes LoRA adapters directly (`add_adapter`, `load_lora_adapter`).

    Parameters:
        sample_size, ...: All config values of [`~diffusers.UNet2DModel`].
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
        TypeError: For a block type whose units cannot be routed.
    """

    plain_class = UNet2DModel

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
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

    @wraps(UNet2DModel.forward, assigned=())
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float, *args, **kwargs):
        """Denoise as the base class does, with its arguments; the routing follows `timestep`."""
        with self._routed(timestep, sample):
            return super().forward(sample, timestep, *args, **kwargs)
