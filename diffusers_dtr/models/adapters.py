"""Routed LoRA: the rank channels of an adapter are routed, and the pretrained model is as it was.

With ΔW = B·A of rank r, an adapter adds B·(m_t ⊙ A·x): the timestep's window of the r channels between A and B, as in
Denoising Task Routing (arXiv 2310.07138). Where timesteps are per frame or token, a layer of the image stream has a
window for each, and any other, of text or sound, that of the noisiest timestep.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from ..routing import ChannelRouting
from .derived_class import DerivedModule, change_class, check_class_can_change, derived_class, signed_as
from .family import ROUTING_PARAMETERS, Family, check_routing_names
from .route import check_is_model, family_of
from .scope import scope_checkpointing, token_mask
from .scoped_model import ScopedModel, ScopedRoutingMixin, scoped_class


class _RoutedProjection(DerivedModule):
    """The first projection of an adapter, whose output is routed."""


class _UnfusableLayer(DerivedModule):
    """An adapted layer of which an adapter is routed."""


def route_adapter(model: ModelMixin, adapter_name: str = "default", **routing: Any) -> ModelMixin:
    """Route the rank channels of a LoRA adapter, in place, or route them anew.

    At `routing_beta=1.0` the adapter is the plain one, to the bit. The model itself is untouched, and saved as what it
    was.

    Args:
        model: A denoiser with the adapter (`model.add_adapter`, `pipeline.load_lora_weights`), routed or not.
        adapter_name: The adapter's name.
        **routing: As for [`route`], of the rank channels, of which half are active by default.

    Returns:
        `model`.

    Raises:
        TypeError: For a model of no known family, and unknown names in `routing`.
        ValueError: If there is no plain LoRA adapter of that name, it is fused or padded for hot-swapping, adapts
            layers that cannot be routed, or the routing does not exist. The model is then as it was.
    """
    family = family_of(model)
    check_routing_names(routing)
    check_adapter_name(model, adapter_name)
    _check_layers(model, adapter_name, family)
    layers = _adapted_layers(model, adapter_name)
    if not layers:
        raise ValueError(f"`adapter_name`={adapter_name!r} must be LoRA, but it adapts no layer by two projections.")
    if any(family.stream_of(block).batch_dim for block in family.streams):
        raise ValueError(
            f"Adapters of a `{type(model).__name__}` cannot be routed: its first axis is not the samples'."
        )
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"`adapter_name`={adapter_name!r} is fused into the weights: call `unfuse_lora` first.")
    if any(layer.lora_A[adapter_name].weight.shape[0] != layer.r[adapter_name] for layer in layers.values()):
        raise ValueError(f"`adapter_name`={adapter_name!r} was padded by `enable_lora_hotswap`: load it without.")
    values = {name: value.default for name, value in ROUTING_PARAMETERS.items()} | {"routing_beta": 0.5} | routing
    if values["routing_timestep_range"] is None:
        values["routing_timestep_range"] = family.range_of(model.config)
    channels = ChannelRouting(*values.values(), widths={layer.r[adapter_name] for layer in layers.values()})
    check_class_can_change(model)
    unroute_adapter(model, adapter_name)
    if not isinstance(model, (ScopedRoutingMixin, ScopedModel)):
        change_class(model, scoped_class(type(model), family.timestep))
        scope_checkpointing(model)
    model.routed_adapters = {**vars(model).get("routed_adapters", {}), adapter_name: channels}
    for name, layer in layers.items():
        projection = layer.lora_A[adapter_name]
        sees_image = not (family.other_streams and re.search(family.other_streams, name))
        key = (adapter_name, layer.r[adapter_name], sees_image)
        change_class(projection, _routed_projection_class(type(projection), key))
        if not isinstance(layer, _UnfusableLayer):
            change_class(layer, _unfusable_class(type(layer)))
    return model


def unroute_adapter(model: ModelMixin, adapter_name: str = "default") -> ModelMixin:
    """Undo [`route_adapter`], if the adapter is routed, and return the model.

    Raises:
        TypeError: For a model that `torch.compile` wraps, and for what is no model of diffusers.
        ValueError: If it has no adapter of that name.
    """
    check_is_model(model)
    adapters = vars(model).get("routed_adapters", {})
    if adapter_name not in list(adapters):  # which need not be hashable
        check_adapter_name(model, adapter_name)
        return model
    remaining = {name: routing for name, routing in adapters.items() if name != adapter_name}
    for layer in _adapted_layers(model, adapter_name).values():
        projection = layer.lora_A[adapter_name]
        if isinstance(projection, _RoutedProjection):
            change_class(projection, projection.unrouted_class)
        if isinstance(layer, _UnfusableLayer) and not remaining.keys() & layer.lora_A.keys():
            change_class(layer, layer.unrouted_class)
    model.routed_adapters = remaining
    if not remaining:
        del model.routed_adapters
        if isinstance(model, ScopedModel):
            scope_checkpointing(model, False)
            change_class(model, model.unrouted_class)
    return model


def adapter_routing(model: ModelMixin, adapter_name: str = "default") -> dict[str, Any] | None:
    """The arguments with which [`route_adapter`] routed an adapter, or None for a plain one."""
    # The layers know: an adapter that was deleted may have been followed by a plain one of its name.
    is_routed = any(_is_routed(layer, adapter_name) for layer in _adapted_layers(model, adapter_name).values())
    return model.routed_adapters[adapter_name].config if is_routed else None


def check_adapter_name(model: ModelMixin, adapter_name: Any) -> None:
    """Refuse what names no adapter of a model."""
    known = list(getattr(model, "peft_config", {}))
    if adapter_name not in known:
        names = ", ".join(known) or "none"
        raise ValueError(f"`adapter_name` must be a LoRA adapter of the model ({names}), got {adapter_name!r}.")


def _adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if adapter_name in getattr(module, "lora_A", ())}


def _check_layers(model: nn.Module, adapter_name: str, family: Family) -> None:
    """Refuse an adapter of which a layer has no rank channels that belong to one sample."""
    for name, layer in model.named_modules():
        is_embedding = adapter_name in getattr(layer, "lora_embedding_A", ())
        variant = getattr(layer, "lora_variant", {}).get(adapter_name)
        if is_embedding or variant is not None:
            kind = type(layer if variant is None else variant).__name__
            raise ValueError(
                f"`adapter_name`={adapter_name!r} must be plain LoRA, got {kind} of `{name}`: only a product of two "
                "projections has rank channels to route."
            )
        if adapter_name in getattr(layer, "lora_A", ()) and family.packed and re.search(family.packed, name):
            raise ValueError(
                f"`adapter_name`={adapter_name!r} cannot be routed in `{name}` of a `{type(model).__name__}`, which "
                "is called with the tokens of all samples in one row: leave it out of its `target_modules`."
            )


@cache
def _routed_projection_class(plain: type[nn.Module], key: Hashable) -> type[nn.Module]:
    plain_forward, is_convolution = plain.forward, issubclass(plain, nn.modules.conv._ConvNd)

    @signed_as(plain_forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = plain_forward(self, *args, **kwargs)
        mask = token_mask(output, channel_dim=1 if is_convolution else -1, key=key)
        return output if mask is None else output * mask

    return derived_class(_RoutedProjection, plain, (_routed_projection_class, (plain, key)), forward=forward)


@cache
def _unfusable_class(plain: type[nn.Module]) -> type[nn.Module]:
    plain_merge, plain_delta = plain.merge, plain.get_delta_weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in adapter_names or self.active_adapters:
            _refuse_routed(self, name)
        plain_merge(self, safe_merge=safe_merge, adapter_names=adapter_names)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        _refuse_routed(self, adapter)
        return plain_delta(self, adapter)

    made_by = (_unfusable_class, (plain,))
    return derived_class(_UnfusableLayer, plain, made_by, merge=merge, get_delta_weight=get_delta_weight)


def _is_routed(layer: nn.Module, adapter_name: str) -> bool:
    return adapter_name in layer.lora_A and isinstance(layer.lora_A[adapter_name], _RoutedProjection)


def _refuse_routed(layer: nn.Module, adapter_name: str) -> None:
    if _is_routed(layer, adapter_name):
        raise ValueError(
            f"The adapter {adapter_name!r} is routed: its weights differ between timesteps and cannot be fused. Keep "
            "it an adapter; `unroute_adapter` makes it a plain one, which changes what it does."
        )
