"""Routes a model in place, and takes it back."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import ModelMixin
from diffusers.utils.torch_utils import is_compiled_module

from .derived_class import plain_type
from .families import TRANSFORMERS, UNETS, routed_class
from .family import Family
from .routed_model import RoutedModelMixin
from .scoped_model import ScopedRoutingMixin


def route(model: ModelMixin, **routing: Any) -> ModelMixin:
    """Give a diffusers model Denoising Task Routing (arXiv 2310.07138), in place and without copying a weight.

    The model may be quantised, on the meta device, offloaded, spread over devices, or have LoRA adapters. A model that
    is routed is routed anew. Assign it, `pipe.transformer = route(pipe.transformer)`: a pipeline records a component's
    class then, and would save the plain one.

    Args:
        model: A denoiser of diffusers, or one whose routed class was declared (see [`Family`]).
        **routing: `routing_alpha`, `routing_beta`, `routing_type`, `routing_seed`, `routing_timestep_range`.

    Returns:
        `model`, whose class is now its routed one.

    Raises:
        TypeError: For a model of no known family, one that `torch.compile` wraps, and unknown names in `routing`.
        ValueError: For a routing that does not exist. In every case the model is as it was.
    """
    check_is_model(model)
    if isinstance(model, RoutedModelMixin) and not isinstance(model, ScopedRoutingMixin):
        raise TypeError(f"`model` is routed by nature: make another `{type(model).__name__}` with `from_transformer`.")
    return _class_for(model)._routed_in_place(model, routing)


def unroute(model: ModelMixin) -> ModelMixin:
    """Undo [`route`], if the model is routed: it has its plain class, config and outputs again, and is returned.

    Raises:
        TypeError: For a model that has no plain class with the same weights, such as a [`DTRTransformer2DModel`], for
            one that `torch.compile` wraps, and for what is no model of diffusers.
    """
    check_is_model(model)
    if not isinstance(model, RoutedModelMixin):
        return model
    if not isinstance(model, ScopedRoutingMixin):
        raise TypeError(
            f"A `{type(model).__name__}` has other weights than a `{model.plain_class.__name__}`; with "
            "`set_routing_beta(1.0)` it is unrouted."
        )
    return model._unrouted_in_place()


def check_is_model(model: Any) -> None:
    """Refuse what wraps a model, and what is none."""
    if is_compiled_module(model):
        raise TypeError("`model` must be a model, not compiled. Route or unroute it before compiling it.")
    if not isinstance(model, ModelMixin):
        raise TypeError(
            f"`model` must be a model of diffusers, got a `{type(model).__name__}`. Of a pipeline it is the "
            "transformer or the unet; unwrap what is wrapped, by `.module` or PEFT's `get_base_model()`."
        )


def family_of(model: ModelMixin) -> Family:
    """What is special about a model, or a TypeError if that is not known."""
    check_is_model(model)
    is_own = isinstance(model, RoutedModelMixin) and not isinstance(model, ScopedRoutingMixin)
    return Family() if is_own else _class_for(model).family


def _class_for(model: ModelMixin) -> type[ScopedRoutingMixin]:
    plain = model.plain_class if isinstance(model, ScopedRoutingMixin) else plain_type(model)
    name = plain.__name__
    if (name in TRANSFORMERS or name in UNETS) and getattr(diffusers, name) is plain:
        return routed_class(name)
    found = ScopedRoutingMixin.routed_classes.get(plain)
    if found is None:
        raise TypeError(
            f"`model` is a `{name}`, whose blocks are not known. Declare it, as the README shows: "
            f"`class DTR{name}(RoutedTransformerMixin, {name}, family=Family(blocks=[...])): ...`."
        )
    return found
