"""The routing that a saved config describes, without building the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import diffusers_dtr

from ..config_types import built_from_file, check_types
from ..models.family import Family
from ..models.routed_model import RoutedModelMixin, config_types
from ..routing import ChannelRouting


def routed_model_class(config: Mapping[str, Any]) -> type[RoutedModelMixin] | None:
    """The class that a `config.json` names, or None if it is not a routed one of this package."""
    name = config.get("_class_name")
    found = getattr(diffusers_dtr, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, RoutedModelMixin) else None


def saved_routing(config: Mapping[str, Any]) -> tuple[ChannelRouting, tuple[int, ...]] | None:
    """The routing of a `config.json` and the widths of its routed blocks, or None if the model is not routed."""
    model_class = routed_model_class(config)
    if model_class is None:
        return None
    check_types(config_types(model_class), config, f"the config of {model_class.__name__}")
    parameters = signature(model_class.__init__).parameters
    defaults = {name: value.default for name, value in parameters.items() if value.default is not Parameter.empty}
    config = {**defaults, **config}
    family = getattr(model_class, "family", Family())
    with built_from_file(f"A {model_class.__name__}"):
        config["routing_timestep_range"] = family.range_of(config)
        widths = _unet_widths(config) if "block_out_channels" in config else _transformer_widths(family, config)
        names = ("routing_alpha", "routing_beta", "routing_type", "routing_seed", "routing_timestep_range")
        return ChannelRouting(*(config[name] for name in names), widths=widths), tuple(sorted(widths))


def _transformer_widths(family: Family, config: Mapping[str, Any]) -> set[int]:
    return {math.prod(config[name.strip()] for name in family.width.split("*"))}


def _unet_widths(config: Mapping[str, Any]) -> set[int]:
    """Widths of the levels, and of the decoder's blocks, whose input has the encoder's output beside it."""
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    layers = [layers] * len(channels) if isinstance(layers, int) else layers
    widths = set(channels)
    for own, finer, coarser, count in zip(
        channels, [channels[0], *channels], [*channels[1:], channels[-1]], layers, strict=False
    ):
        widths |= {coarser + own, own + finer} | ({2 * own} if count > 1 else set())
    return widths
