"""U-Nets with routed residual units: y = shortcut(x) + F(m ⊙ x), each width with its own window.

In every unit the residual branch F begins with one norm, while the shortcut takes the unit's own input: masking what
that norm sees is the whole routing. The samplers between blocks are not routed. The authors of DTR (arXiv
2310.07138) released no U-Net: this reading of the method is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import ModelMixin
from torch import nn

from .derived_class import plain_type
from .routed_blocks import masked_class
from .scoped_model import ScopedRoutingMixin


# Attributes of a block that are lists of its residual units.
_UNITS = ("resnets", "attentions", "temp_convs", "temp_attentions", "motion_modules")

# By class of a unit: where the norms are that its residual branches begin with.
_FIRST_NORMS = {
    "ResnetBlock2D": ["norm1"],
    "Attention": ["group_norm"],
    "Transformer2DModel": ["norm"],
    "TemporalConvLayer": ["conv1.0"],
    "TransformerTemporalModel": ["norm"],
    "AnimateDiffTransformer3D": ["norm"],
    "SpatioTemporalResBlock": ["spatial_res_block.norm1", "temporal_res_block.norm1"],
    "TransformerSpatioTemporalModel": ["norm"],
}


class NoNorm(nn.Identity):
    """Stands where a residual branch has no norm of its own: attention in the mid block of ADM-style models."""


class RoutedUNetMixin(ScopedRoutingMixin):
    """Routes a U-Net; to be named before the plain class."""

    is_unet = True

    @classmethod
    def _widths(cls, config: Mapping[str, Any]) -> set[int]:
        # Every routed width is one of these, or a sum of them.
        return set(config["block_out_channels"])

    @classmethod
    def _routed_widths_of(cls, model: nn.Module) -> set[int]:
        return {width for *_, width in _first_norms(model)}

    @classmethod
    def _units(cls, model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
        norms = list(_first_norms(model))
        for parent, name, _ in norms:
            if getattr(parent, name) is None:
                setattr(parent, name, NoNorm())
        found = [getattr(parent, name) for parent, name, _ in norms]
        return [(norm, masked_class(plain_type(norm))) for norm in found]

    def _unroute_units(self) -> None:
        super()._unroute_units()
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, NoNorm):
                    setattr(module, name, None)

    @classmethod
    def from_unet(cls, unet: ModelMixin, **routing: Any) -> ModelMixin:
        """As [`RoutedTransformerMixin.from_transformer`]; a TypeError too for units such as K-diffusion's."""
        return cls._from_plain(unet, "unet", routing)


def _first_norms(unet: nn.Module) -> Iterator[tuple[nn.Module, str, int]]:
    """Where every routed norm is or would be, with its width: parent, attribute, channels."""
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    units = [unit for block in blocks for name in _UNITS for unit in getattr(block, name, None) or ()]
    for unit in units:
        if unit is None:
            continue
        if type(unit).__name__ not in _FIRST_NORMS:
            raise TypeError(
                f"A U-Net with a `{type(unit).__name__}` cannot be routed. What can are "
                f"{', '.join(f'`{name}`' for name in _FIRST_NORMS)}."
            )
        for path in _FIRST_NORMS[type(unit).__name__]:
            parent_path, _, name = path.rpartition(".")
            parent = unit.get_submodule(parent_path)
            norm = getattr(parent, name)
            width = unit.query_dim if norm is None or isinstance(norm, NoNorm) else norm.num_channels
            yield parent, name, width
