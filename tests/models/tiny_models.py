"""A tiny model of every routed class with random weights, its plain counterpart, and inputs for both."""

# ruff: noqa: C408
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from diffusers import ModelMixin
from tiny_dit import CONFIG as DIT_CONFIG
from tiny_dit import plain_dit, with_random_weights

from diffusers_dtr import (
    DTRFluxTransformer2DModel,
    DTRPixArtTransformer2DModel,
    DTRSD3Transformer2DModel,
    DTRTransformer2DModel,
    DTRUNet2DConditionModel,
    DTRUNet2DModel,
)


TIMESTEPS = torch.tensor([0, 500, 978, 999])


@dataclass(frozen=True)
class Family:
    """One routed class and what its tests need to know of it."""

    routed_class: type[ModelMixin]
    config: dict
    make_inputs: Callable[[torch.Tensor, Callable[..., torch.Tensor]], dict] = field(repr=False)
    # The timesteps of training, 0 to 999, as this family's pipelines pass them.
    timestep_scale: float = 1.0

    @property
    def conversion(self) -> Callable[..., ModelMixin]:
        cls = self.routed_class
        return cls.from_unet if hasattr(cls, "from_unet") else cls.from_transformer

    def routed(self, **config) -> ModelMixin:
        return with_random_weights(self.routed_class(**{**self.config, **config}))

    def plain(self, **config) -> ModelMixin:
        if self.routed_class is DTRTransformer2DModel:
            return plain_dit(**config)
        return with_random_weights(self.routed_class.plain_class(**{**self.config, **config}))

    def inputs(self, timestep: torch.Tensor = TIMESTEPS) -> dict:
        """Arguments of one forward call for a batch of training timesteps."""
        generator = torch.Generator().manual_seed(1)
        scaled = timestep if self.timestep_scale == 1 else timestep * self.timestep_scale
        return self.make_inputs(scaled, lambda *shape: torch.randn(len(timestep), *shape, generator=generator))


@torch.no_grad()
def output(model: ModelMixin, arguments: dict) -> torch.Tensor:
    return model(**arguments).sample


def recorded_calls(model: ModelMixin, pattern: str, arguments: dict) -> dict[str, tuple]:
    """What the sub-modules whose names match were called with and returned, as {name: (args, kwargs, output)}."""
    calls = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, kwargs, output, name=name: calls.__setitem__(name, (args, kwargs, output)),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
        if re.fullmatch(pattern, name)
    ]
    output(model, arguments)
    for handle in handles:
        handle.remove()
    return calls


def in_double(arguments):
    """The arguments of a forward call with every floating-point tensor in float64."""
    if isinstance(arguments, dict):
        return {name: in_double(value) for name, value in arguments.items()}
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(map(in_double, arguments))
    return arguments.double() if torch.is_tensor(arguments) and arguments.is_floating_point() else arguments


def window(timestep: torch.Tensor, width: int, alpha: float = 4.0, beta: float = 0.8) -> torch.Tensor:
    """The channel mask by its formula, one sample after the other: float64 `(batch, width)`."""
    active, mask = int(beta * width), torch.zeros(len(timestep), width, dtype=torch.float64)
    for row, t in zip(mask, timestep.tolist(), strict=True):
        start = round((width - active) * min(max(t / 999, 0), 1) ** alpha)
        row[start : start + active] = 1
    return mask


HEADS = dict(num_attention_heads=2, attention_head_dim=8)
LEVELS = dict(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)

DIT = Family(
    DTRTransformer2DModel,
    DIT_CONFIG,
    lambda t, randn: dict(hidden_states=randn(4, 8, 8), timestep=t, class_labels=torch.arange(len(t)) % 5),
)
UNET = Family(
    DTRUNet2DModel,
    dict(
        **LEVELS, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ),
    lambda t, randn: dict(sample=randn(3, 8, 8), timestep=t),
)  # fmt: skip
UNET_CONDITION = Family(
    DTRUNet2DConditionModel,
    dict(
        **LEVELS, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2, cross_attention_dim=12,
    ),
    lambda t, randn: dict(sample=randn(4, 8, 8), timestep=t, encoder_hidden_states=randn(5, 12)),
)  # fmt: skip
PIXART = Family(
    DTRPixArtTransformer2DModel,
    dict(**HEADS, num_layers=3, sample_size=8, cross_attention_dim=16, caption_channels=12),
    lambda t, randn: dict(
        hidden_states=randn(4, 8, 8),
        timestep=t,
        encoder_hidden_states=randn(5, 12),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ),
)
SD3 = Family(
    DTRSD3Transformer2DModel,
    dict(
        **HEADS, num_layers=3, sample_size=8, in_channels=4, out_channels=4, joint_attention_dim=12,
        caption_projection_dim=16, pooled_projection_dim=12, pos_embed_max_size=8, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ),
    lambda t, randn: dict(
        hidden_states=randn(4, 8, 8), timestep=t, encoder_hidden_states=randn(5, 12), pooled_projections=randn(12)
    ),
)  # fmt: skip
FLUX = Family(
    DTRFluxTransformer2DModel,
    dict(
        **HEADS, num_layers=2, num_single_layers=2, in_channels=4, joint_attention_dim=12, pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
    ),
    lambda t, randn: dict(
        hidden_states=randn(6, 4), timestep=t, encoder_hidden_states=randn(5, 12), pooled_projections=randn(12),
        img_ids=torch.randint(6, (6, 3), generator=torch.Generator().manual_seed(2)), txt_ids=torch.zeros(5, 3),
    ),
    timestep_scale=1 / 999,
)  # fmt: skip
FAMILIES = (DIT, UNET, UNET_CONDITION, PIXART, SD3, FLUX)
SCOPED_FAMILIES = FAMILIES[1:]


def of_families(families: tuple[Family, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("family", families, ids=lambda family: family.routed_class.__name__)


every_family, every_scoped_family = of_families(FAMILIES), of_families(SCOPED_FAMILIES)
