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


def saved_routing(config: Mapping[str, Any]) -> tuple[ChannelRouting, tuple[int, ...]] | None:
    """The routing of a `config.json` and the widths of its routed blocks, or None if the model is not routed."""
    name = config.get("_class_name")
    model_class = getattr(diffusers_dtr, name, None) if isinstance(name, str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, RoutedModelMixin)):
        return None
    check_types(config_types(model_class), config, f"the config of {name}")
    parameters = signature(model_class.__init__).parameters
    defaults = {name: value.default for name, value in parameters.items() if value.default is not Parameter.empty}
    config = {**defaults, **config}
    family = getattr(model_class, "family", Family())
    with built_from_file(f"A {name}"):
        config["routing_timestep_range"] = family.range_of(config)
        is_unet = "block_out_channels" in config
        widths = _unet_widths(config) if is_unet else {math.prod(config[name] for name in family.widths)}
        names = ("alpha", "beta", "type", "seed", "timestep_range")
        routing = ChannelRouting(*(config[f"routing_{name}"] for name in names), widths=widths)
    return routing, tuple(sorted(widths))


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
