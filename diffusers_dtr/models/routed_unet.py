"""Routes the residual units of diffusers' 2D U-Nets: y = shortcut(x) + F(m ⊙ x), each width with its own window.

A U-Net's routed units are the entries of its blocks' `resnets` and `attentions`. In every one the residual branch F
begins with one norm, while the shortcut takes the unit's own input. Masking what that norm sees is therefore the
whole routing, whatever the unit does besides: 1x1 shortcuts, resampling, scaled outputs. The samplers between blocks,
convolutions or ResNet blocks, are not routed.
"""

from __future__ import annotations

import torch
from diffusers import ModelMixin, Transformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from .routing_scope import ScopedRoutingMixin, current_mask


# The name of the norm that a unit's residual branch begins with.
_FIRST_NORM = {ResnetBlock2D: "norm1", Attention: "group_norm", Transformer2DModel: "norm"}


def _mask_channels(hidden_states: torch.Tensor) -> torch.Tensor:
    """Apply this call's mask to `(batch, channels, ...)`."""
    mask = current_mask(hidden_states.shape[1], hidden_states.device)
    if mask is None:
        return hidden_states
    return hidden_states * mask.reshape(*mask.shape, *(1,) * (hidden_states.ndim - 2))


class RoutedGroupNorm(nn.GroupNorm):
    """The norm that a residual branch begins with, seeing only the active channels."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise the active channels of `(batch, channels, ...)`."""
        return super().forward(_mask_channels(input))


class ChannelMask(nn.Module):
    """Stands where a residual branch has no norm of its own: attention in the mid block of ADM-style models."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Keep the active channels of `(batch, channels, ...)`."""
        return _mask_channels(input)


def _route_unit(unit: nn.Module) -> int:
    """Route a unit in place; returns its width."""
    if type(unit) not in _FIRST_NORM:
        raise TypeError(
            f"A U-Net with a `{type(unit).__name__}` cannot be routed. What can are "
            f"{', '.join(f'`{unit_class.__name__}`' for unit_class in _FIRST_NORM)}."
        )
    name = _FIRST_NORM[type(unit)]
    norm = getattr(unit, name)
    if norm is None:
        setattr(unit, name, ChannelMask())
        return unit.query_dim
    # The class and not the instance: state dict, copies and pickles stay as they are.
    norm.__class__ = RoutedGroupNorm
    return norm.num_channels


class RoutedUNetMixin(ScopedRoutingMixin):
    """Routes a U-Net that was built by its base class."""

    def _route_units(self) -> None:
        blocks = (*self.down_blocks, self.mid_block, *self.up_blocks)
        units = [unit for block in blocks for name in ("resnets", "attentions") for unit in getattr(block, name, ())]
        self.routed_widths = tuple(sorted({_route_unit(unit) for unit in units if unit is not None}))

    @classmethod
    def from_unet(cls, unet: ModelMixin, **routing) -> ModelMixin:
        """The routed model with the weights of a plain one, which is left as it is.

        Args:
            unet: A model of the diffusers class that this one routes.
            **routing: Config values that the plain model does not have: `routing_alpha`, `routing_beta`, ...

        Returns:
            A model with copies of the weights, on the same device, of the same dtype and in the same mode.

        Raises:
            TypeError: If `unet` is of another class, or a name in `routing` is not one of a config value.
        """
        return cls._from_plain(unet, "unet", routing)
