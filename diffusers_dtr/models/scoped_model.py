"""Models within whose forward calls there are masks: routed ones, and plain ones with routed adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from functools import cache
from inspect import Signature, signature
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from torch import nn

from ..call_timesteps import argument, timestep_batch
from ..routing import ChannelRouting
from .derived_class import DerivedModule, change_class, check_class_can_change, derived_class, signed_as
from .family import ROUTING_PARAMETERS, Family, check_family, check_routing_names, routing_parameters
from .routed_blocks import RoutedBlock
from .routed_model import RoutedModelMixin
from .scope import ScopedMixin, scope, scope_checkpointing


class ScopedRoutingMixin(ScopedMixin, RoutedModelMixin):
    """Routes the blocks of a model in place, through the [`scope`] of its forward calls.

    A subclass names the plain class beside a mixin of this kind, and its family:
    `class DTRMyModel(RoutedTransformerMixin, MyModel, family=Family(blocks=["layers"])): ...`. Its constructor and its
    config are derived from the plain class's.

    Attributes:
        family: What is special about the model.
        is_unet: Whether it is routed by residual units and not by blocks.
    """

    family: ClassVar[Family]
    is_unet: ClassVar[bool] = False
    # By plain class; see `diffusers_dtr.route`.
    routed_classes: ClassVar[dict[type[ModelMixin], type[ScopedRoutingMixin]]] = {}

    def __init_subclass__(cls, family: Family | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        is_declared = hasattr(cls, "plain_class")
        if family is None and (hasattr(cls, "family") or not is_declared):  # of a routed class, or a mixin
            return
        if not is_declared or cls.__mro__.index(ScopedRoutingMixin) > cls.__mro__.index(cls.plain_class):
            raise TypeError(
                f"`{cls.__name__}` must name the class that it routes, after the mixin: "
                f"`class {cls.__name__}(RoutedTransformerMixin, MyModel, family=Family(...))`."
            )
        check_family(family, cls.plain_class, cls.is_unet)
        cls.family = family
        cls.__init__ = _derived_constructor(cls.plain_class, family)
        cls.forward = _scoped_forward(cls.plain_class, family.timestep)
        ScopedRoutingMixin.routed_classes[cls.plain_class] = cls

    @classmethod
    def _widths(cls, config: Mapping[str, Any]) -> set[int]:
        """What a config tells of the routed widths before a model is built."""
        raise NotImplementedError  # transformers and U-Nets have it, each in a way of its own

    @classmethod
    def _routed_widths_of(cls, model: nn.Module) -> set[int]:
        return cls._widths(model.config)

    @classmethod
    def _units(cls, model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
        """What is to be routed of a model, and its routed classes; all that can be wrong of it is found here."""
        raise NotImplementedError  # transformers and U-Nets have it, each in a way of its own

    def _unroute_units(self) -> None:
        for module in self.modules():
            if isinstance(module, RoutedBlock):
                change_class(module, module.unrouted_class)

    @classmethod
    def _from_plain(cls, model: ModelMixin, argument: str, routing: Mapping[str, Any]) -> ModelMixin:
        if not isinstance(model, cls.plain_class):
            raise TypeError(f"`{argument}` must be a `{cls.plain_class.__name__}`, got a `{type(model).__name__}`.")
        return cls._routed_in_place(copy.deepcopy(model), routing)

    @classmethod
    def _routed_in_place(cls, model: ModelMixin, routing: Mapping[str, Any]) -> ModelMixin:
        """The same model, routed. Everything that can be wrong is found before anything is changed."""
        check_routing_names(routing)
        defaults = {name: parameter.default for name, parameter in routing_parameters(cls.family).items()}
        config = {name: model.config.get(name, default) for name, default in defaults.items()} | dict(routing)
        config["routing_timestep_range"] = cls.family.range_of({**model.config, **config})
        widths = cls._routed_widths_of(model)
        check = ChannelRouting(*(config[name] for name in ROUTING_PARAMETERS), widths=widths)
        check_class_can_change(model)
        was_routed = isinstance(model, cls)
        units = [] if was_routed else cls._units(model)
        if not was_routed:
            if isinstance(model, ScopedRoutingMixin):  # of a class that was declared before
                ScopedRoutingMixin._unroute_units(model)
            change_class(model, cls)
        model.register_to_config(**config)
        model.routing, model.routed_widths = check, tuple(sorted(widths))
        # Classes and not instances: state dicts, copies and pickles stay.
        for unit, routed in units:
            change_class(unit, routed)
        if not was_routed:
            scope_checkpointing(model)
        return model

    def _unrouted_in_place(self) -> ModelMixin:
        """The same model, of its plain class."""
        self._unroute_units()
        scope_checkpointing(self, False)
        del self.routing, self.routed_widths
        # diffusers has no public way to take back a config value.
        plain_config = {name: value for name, value in self.config.items() if name not in ROUTING_PARAMETERS}
        self._internal_dict = FrozenDict(plain_config)
        plain, timestep = self.plain_class, self.family.timestep
        change_class(self, plain)
        if "routed_adapters" in vars(self):
            scope_checkpointing(self)
            change_class(self, scoped_class(plain, timestep))
        return self


def _derived_constructor(plain_class: type[ModelMixin], family: Family) -> Callable[..., None]:
    """A constructor with the arguments of the plain one and the routing's, all of which become the config."""
    plain = signature(plain_class.__init__).parameters
    arguments = Signature([*plain.values(), *routing_parameters(family).values()])

    def __init__(self, *args: Any, **kwargs: Any):
        try:
            arguments.bind(self, *args, **kwargs)
        except TypeError as error:  # in the words of Python's own, which name the function
            raise TypeError(f"{type(self).__name__}.__init__() {error}") from None
        self.register_to_config(routing_timestep_range=family.range_of(self.config))
        self._init_routing(self._widths(self.config))
        # Through the config, which has all values by name; the plain constructor registers them again.
        plain_class.__init__(self, **{name: self.config[name] for name in plain if name in self.config})
        for unit, routed in self._units(self):
            change_class(unit, routed)
        self.routed_widths = tuple(sorted(self._routed_widths_of(self)))

    __init__.__signature__ = arguments
    return register_to_config(__init__)


def _masks(model: ModelMixin, timesteps: torch.Tensor) -> dict[Hashable, torch.Tensor | None]:
    """All masks of one forward call, by width; of adapters by name, rank and whether a layer sees the image stream."""
    masks = {}
    for name, routing in vars(model).get("routed_adapters", {}).items():
        low, high = routing.timestep_range
        for rank in routing.widths:
            masks[name, rank, True] = masks[name, rank, False] = routing.mask(timesteps, rank)
            if timesteps.ndim > 1:
                noisiest = timesteps.amax(1) if low < high else timesteps.amin(1)
                masks[name, rank, False] = routing.mask(noisiest, rank)
    if isinstance(model, ScopedRoutingMixin):
        masks |= {width: model.routing.mask(timesteps, width) for width in model.routed_widths}
    return masks


class ScopedModel(ScopedMixin, DerivedModule):
    """A model of a class that is not routed itself, but has routed adapters."""


@cache
def scoped_class(plain_class: type[ModelMixin], timestep: str) -> type[ModelMixin]:
    """The class of a model with routed adapters, by its own and by what its timestep is called."""
    forward = _scoped_forward(plain_class, timestep)
    return derived_class(ScopedModel, plain_class, (scoped_class, (plain_class, timestep)), forward=forward)


def _scoped_forward(plain_class: type[ModelMixin], timestep_name: str) -> Callable:
    arguments = list(signature(plain_class.forward).parameters)[1:]
    position = arguments.index(timestep_name)
    # The function and not the class's attribute, which the compiler does not follow for every class.
    plain_forward = plain_class.forward

    @signed_as(plain_forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Denoise as the base class does, with its arguments; the routing follows the timestep."""
        timestep = argument(timestep_name, position, args, kwargs)
        timesteps = timestep_batch(timestep, argument(arguments[0], 0, args, kwargs), per_token=True)
        with scope(_masks(self, timesteps)):
            return plain_forward(self, *args, **kwargs)

    return forward
