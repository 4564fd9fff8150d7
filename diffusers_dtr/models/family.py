"""What a declaration becomes: a routed class with a constructor derived from the plain one's, and routed blocks.

A routed class is a subclass of a diffusers model that says, as a [`Family`], which of its blocks are routed and how it
is told the timestep. Everything else follows: the constructor and its config, which blocks change class, what
diffusers looks up by class name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, wraps
from inspect import Parameter, Signature, signature
from typing import Any, ClassVar, get_type_hints

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from torch import nn

from ..config_types import built_from_file, check_types, constructor_types
from ..diffusers_registration import block_metadata, register_block, register_lora_scales
from ..hub.commit import check_token
from ..hub.shared import HubMixin
from ..routing import DEFAULT_TIMESTEP_RANGE, ChannelRouting
from .change_class import change_class, check_class_can_change
from .derived_class import DerivedModule, derived_class
from .routed_blocks import RoutedBlock, Stream, routed_block_class
from .scope import ScopedCheckpointingMixin, scope, scope_checkpointing, unscope_checkpointing


@dataclass(frozen=True)
class Family:
    """What is not the same in all denoisers.

    Attributes:
        timestep: Name of the argument of the model's forward method.
        timestep_range: Its values at the cleanest and at the noisiest step, as the model's pipelines pass them. It
            may run downwards: (1.0, 0.0) where 1 means clean. A function of the config where checkpoints of one class
            differ.
        blocks: Attributes of the model that are lists of routed blocks. None for every list of blocks whose class is
            one of the model's `_repeated_blocks`.
        streams: By class name of a block, for those of which diffusers' `TransformerBlockRegistry` does not tell it:
            the place of the image stream in the tuple that the block returns, or a [`Stream`].
        width: Config values whose product is the number of channels of the blocks.
    """

    timestep: str = "timestep"
    timestep_range: tuple[float, float] | Callable[[Mapping[str, Any]], tuple[float, float]] = DEFAULT_TIMESTEP_RANGE
    blocks: Sequence[str] | None = None
    streams: Mapping[str, int | Stream] = field(default_factory=dict)
    width: str = "num_attention_heads * attention_head_dim"

    def range_of(self, config: Mapping[str, Any]) -> Sequence[float] | None:
        """The range that a model's config has or, where it has none, that follows from it."""
        given = config["routing_timestep_range"]
        return self.timestep_range(config) if given is None and callable(self.timestep_range) else given


def _routing_config(
    *,
    routing_alpha: float = 4.0,
    routing_beta: float = 0.8,
    routing_type: str = "dtr",
    routing_seed: int = 0,
    routing_timestep_range: Sequence[float] | None = None,
) -> None:
    """The config values that a routed model has beside those of the plain one."""


_ROUTING_PARAMETERS = signature(_routing_config).parameters


@cache
def config_types(model_class: type[RoutedModelMixin]) -> dict[str, Any]:
    """What a routed model's config may hold, for [`~diffusers_dtr.config_types.check_types`].

    Args:
        model_class: The routed class.

    Returns:
        Type hints by name.
    """
    hints = get_type_hints(_routing_config)
    routing = {name: hints[name] for name in _ROUTING_PARAMETERS}
    # A derived constructor has no annotations of its own.
    derived = hasattr(model_class.__init__, "__signature__")
    return {**constructor_types(model_class.plain_class if derived else model_class), **routing}


class RoutedModelMixin(HubMixin):
    """Gives a diffusers model the routing that its config describes, and what [`HubMixin`] does with the Hub.

    Attributes:
        plain_class: The diffusers class that is routed.
        routing: Computes the masks of a forward call.
        routed_widths: Channels of the routed blocks, each width once, in ascending order.
    """

    plain_class: ClassVar[type[ModelMixin]]
    routing: ChannelRouting
    routed_widths: tuple[int, ...]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        plain = [
            base for base in cls.__mro__ if issubclass(base, ModelMixin) and not issubclass(base, RoutedModelMixin)
        ]
        if plain:
            cls.plain_class = plain[0]
            register_lora_scales(cls, cls.plain_class)

    def register_to_config(self, **config: Any) -> None:
        """Set config values, as diffusers' constructors do before anything is built.

        Raises:
            ValueError: For values of the wrong type, see [`~diffusers_dtr.config_types.check_types`].
        """
        check_types(config_types(type(self)), config, f"the config of {type(self).__name__}")
        super().register_to_config(**config)

    @classmethod
    def from_config(cls, config: dict[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs) -> Any:
        """Make a model of a config, as diffusers does.

        Raises:
            ValueError: For values of the wrong type, and for a config of which no model can be made.
        """
        with built_from_file(f"A {cls.__name__}"):
            return super().from_config(config, return_unused_kwargs, **kwargs)

    # Wrapped, because pipelines look at the arguments.
    @wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        check_token(kwargs.get("token"))
        super().save_pretrained(*args, **kwargs)

    def _init_routing(self, widths: set[int]) -> None:
        """Read the routing from the config; call it before any layer is built, so that a bad value costs nothing."""
        config = self.config
        self.routed_widths = tuple(sorted(widths))
        self.routing = ChannelRouting(
            alpha=config.routing_alpha,
            beta=config.routing_beta,
            routing_type=config.routing_type,
            seed=config.routing_seed,
            timestep_range=config.routing_timestep_range,
            widths=widths,
        )

    def set_routing_beta(self, beta: float | None) -> None:
        """Route with another share of active channels from now on; None returns to `config.routing_beta`.

        For warming up from the unrouted model: a fine-tuning run that starts at 1 starts exactly at the pretrained
        model. The config, and so what is saved, does not change. A compiled model has one graph for all shares set
        here, and another for the configured one.

        Args:
            beta: Share of active channels, in (0, 1], or None.

        Raises:
            ValueError: For a `beta` outside (0, 1], or one that leaves a block no active channel.
        """
        self.routing.set_beta(beta)


class ScopedRoutingMixin(ScopedCheckpointingMixin, RoutedModelMixin):
    """Routes the blocks of a model in place, through the [`scope`] of its forward calls.

    A subclass names the plain class beside a mixin of this kind, and its family:
    `class DTRMyModel(RoutedTransformerMixin, MyModel, family=Family(blocks=["layers"])): ...`.

    Attributes:
        family: What is special about the model.
    """

    family: ClassVar[Family]
    # By plain class; see `diffusers_dtr.route`.
    routed_classes: ClassVar[dict[type[ModelMixin], type[ScopedRoutingMixin]]] = {}

    def __init_subclass__(cls, family: Family | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if family is None:
            return
        cls.family = family
        cls.__init__ = _derived_constructor(cls.plain_class, family)
        cls.forward = _scoped_forward(cls.plain_class, family.timestep)
        ScopedRoutingMixin.routed_classes[cls.plain_class] = cls

    @classmethod
    def _widths(cls, config: Mapping[str, Any]) -> set[int]:
        """What a config tells of the routed widths before a model is built."""
        raise NotImplementedError

    @classmethod
    def _routed_widths_of(cls, model: nn.Module) -> set[int]:
        """The routed widths of a model that is built."""
        return cls._widths(model.config)

    def _route_modules(self) -> None:
        """Change the classes of what is routed, and not the instances: state dicts, copies and pickles stay."""
        raise NotImplementedError

    def _unroute_modules(self) -> None:
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
        unknown = routing.keys() - _ROUTING_PARAMETERS.keys()
        if unknown:
            raise TypeError(
                f"Routing has no `{min(unknown)}`; it has {', '.join(f'`{name}`' for name in _ROUTING_PARAMETERS)}."
            )
        defaults = {name: parameter.default for name, parameter in _routing_parameters(cls.family).items()}
        config = {name: model.config.get(name, default) for name, default in defaults.items()} | dict(routing)
        config["routing_timestep_range"] = cls.family.range_of({**model.config, **config})
        widths = cls._routed_widths_of(model)
        check = ChannelRouting(*(config[name] for name in _ROUTING_PARAMETERS), widths=widths)
        check_class_can_change(model)
        was_routed = isinstance(model, cls)
        if not was_routed:
            change_class(model, cls)
        model.register_to_config(**config)
        model.routing, model.routed_widths = check, tuple(sorted(widths))
        if not was_routed:
            model._route_modules()
            scope_checkpointing(model)
        return model

    def _unrouted_in_place(self) -> ModelMixin:
        """The same model, of its plain class."""
        self._unroute_modules()
        unscope_checkpointing(self)
        del self.routing, self.routed_widths
        # diffusers has no public way to take back a config value.
        self._internal_dict = FrozenDict(
            {name: value for name, value in self.config.items() if name not in _ROUTING_PARAMETERS}
        )
        plain, timestep = self.plain_class, self.family.timestep
        change_class(self, plain)
        if "routed_adapters" in vars(self):
            scope_checkpointing(self)
            change_class(self, scoped_class(plain, timestep))
        return self


class RoutedTransformerMixin(ScopedRoutingMixin):
    """Routes a transformer, whose blocks all have one width; to be named before the plain class."""

    @classmethod
    def _widths(cls, config: Mapping[str, Any]) -> set[int]:
        return {math.prod(config[name.strip()] for name in cls.family.width.split("*"))}

    def _route_modules(self) -> None:
        for block in self._blocks():
            change_class(block, _routed_block(type(block), self.family.streams))

    def _blocks(self) -> Iterator[nn.Module]:
        """The routed blocks, in order."""
        if self.family.blocks is not None:
            lists = [self.get_submodule(name) for name in self.family.blocks]
        else:
            names = set(self.plain_class._repeated_blocks)
            lists = [
                child
                for child in self.children()
                if isinstance(child, nn.ModuleList) and {type(block).__name__ for block in child} & names
            ]
        for blocks in lists:
            yield from blocks

    @classmethod
    def from_transformer(cls, transformer: ModelMixin, **routing: Any) -> ModelMixin:
        """The routed model with the weights of a plain one, which is left as it is.

        Args:
            transformer: A model of the diffusers class that this one routes.
            **routing: Config values that the plain model does not have: `routing_alpha`, `routing_beta`, ...

        Returns:
            A model with copies of the weights, on the same device, of the same dtype and in the same mode.

        Raises:
            TypeError: If `transformer` is of another class, or a name in `routing` is not one of a config value.
            ValueError: For a routing that does not exist.
        """
        return cls._from_plain(transformer, "transformer", routing)


@dataclass(frozen=True)
class Argument:
    """One argument of a function.

    Attributes:
        name: Its name.
        position: Its place, counted from 0.
    """

    name: str
    position: int

    def value(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call gives it, or None."""
        if self.name in kwargs:
            return kwargs[self.name]
        return args[self.position] if self.position < len(args) else None


def timestep_batch(
    timestep: torch.Tensor | float | None,
    sample: torch.Tensor | Sequence[torch.Tensor],
    *,
    per_token: bool = False,
) -> torch.Tensor:
    """The timesteps of a forward call, one per sample or one per frame or token, on the sample's device.

    Args:
        timestep: Scalar, `(batch,)`, or `(batch, ...)` with n per sample, one per frame or token.
        sample: `(batch, ...)`, or a list with a tensor for each sample.
        per_token: Whether `(batch, n)` is allowed.

    Returns:
        `(batch,)` or `(batch, n)`.

    Raises:
        ValueError: If `timestep` is None, or of another shape.
    """
    if timestep is None:  # as it is by default in some of diffusers' models
        raise ValueError("`timestep` must be given: the conditioning and the routing depend on it.")
    batch, device = len(sample), _device(sample)
    if not torch.is_tensor(timestep):
        timestep = torch.tensor(timestep, device=device)
    timestep = timestep.to(device)
    if per_token and timestep.ndim > 1 and timestep.shape[0] == batch:
        timestep = timestep.reshape(batch, -1)
        return timestep if timestep.shape[1] > 1 else timestep[:, 0]
    if timestep.ndim > 1 or timestep.numel() not in (1, batch):
        raise ValueError(
            f"`timestep` must be a scalar or of shape (batch,){' or (batch, n)' if per_token else ''} with batch = "
            f"{batch}, got {tuple(timestep.shape)}."
        )
    return timestep.reshape(-1).expand(batch)


def _device(sample: torch.Tensor | Sequence) -> torch.device:
    return sample.device if torch.is_tensor(sample) else _device(sample[0])


def _routing_parameters(family: Family) -> dict[str, Parameter]:
    known = family.timestep_range != DEFAULT_TIMESTEP_RANGE and not callable(family.timestep_range)
    default = family.timestep_range if known else None
    window = _ROUTING_PARAMETERS["routing_timestep_range"].replace(default=default)
    return {**_ROUTING_PARAMETERS, "routing_timestep_range": window}


def _masks(model: ModelMixin, timesteps: torch.Tensor) -> dict[Hashable, torch.Tensor | None]:
    """All masks of one forward call: of the residual stream, by width, and of adapters, by name and rank."""
    masks = {}
    for name, routing in vars(model).get("routed_adapters", {}).items():
        masks |= {(name, rank): routing.mask(timesteps, rank) for rank in routing.widths}
    if isinstance(model, ScopedRoutingMixin):
        masks |= {width: model.routing.mask(timesteps, width) for width in model.routed_widths}
    return masks


class ScopedModel(ScopedCheckpointingMixin, DerivedModule):
    """A model of a class that is not routed itself, but has routed adapters."""


@cache
def scoped_class(plain_class: type[ModelMixin], timestep: str) -> type[ModelMixin]:
    """The class of a model within whose forward calls there are masks.

    Args:
        plain_class: Its own class.
        timestep: Name of the argument of its forward method.
    """
    forward = _scoped_forward(plain_class, timestep)
    return derived_class(ScopedModel, plain_class, (scoped_class, (plain_class, timestep)), forward=forward)


def _scoped_forward(plain_class: type[ModelMixin], timestep_name: str) -> Callable:
    """The forward method of a model, within the scope of its call's masks.

    Raises:
        ValueError: If it has no such argument as the family says.
    """
    arguments = list(signature(plain_class.forward).parameters)[1:]
    if timestep_name not in arguments:
        raise ValueError(
            f"`timestep` of the family must be an argument of `{plain_class.__name__}.forward`, "
            f"{', '.join(arguments)}, got {timestep_name!r}."
        )
    timestep, sample = Argument(timestep_name, arguments.index(timestep_name)), Argument(arguments[0], 0)
    # The function and not the class's attribute, which the compiler does not follow for every class.
    plain_forward = plain_class.forward

    @wraps(plain_forward, assigned=())
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Denoise as the base class does, with its arguments; the routing follows the timestep."""
        timesteps = timestep_batch(timestep.value(args, kwargs), sample.value(args, kwargs), per_token=True)
        with scope(_masks(self, timesteps)):
            return plain_forward(self, *args, **kwargs)

    return forward


def _derived_constructor(plain_class: type[ModelMixin], family: Family) -> Callable[..., None]:
    """A constructor with the arguments of the plain one and the routing's, all of which become the config."""
    plain = signature(plain_class.__init__).parameters

    def __init__(self, *args: Any, **kwargs: Any):
        self.register_to_config(routing_timestep_range=family.range_of(self.config))
        self._init_routing(self._widths(self.config))
        # Through the config, which has all values by name; the plain constructor registers them again.
        plain_class.__init__(self, **{name: self.config[name] for name in plain if name in self.config})
        self._route_modules()

    __init__.__signature__ = Signature([*plain.values(), *_routing_parameters(family).values()])
    return register_to_config(__init__)


def _routed_block(plain: type[nn.Module], streams: Mapping[str, int | Stream]) -> type[nn.Module]:
    """The routed class of a block, which diffusers' caches know as they know the plain one."""
    metadata = block_metadata(plain)
    stream = streams.get(plain.__name__)
    if isinstance(stream, int):
        stream = Stream(output=stream)
    elif stream is None and metadata is not None:
        # The registry's default name is not always that of the argument.
        named = metadata.hidden_states_argument_name in signature(plain.forward).parameters
        argument = metadata.hidden_states_argument_name if named else None
        stream = Stream(argument, metadata.return_hidden_states_index)
    routed = routed_block_class(plain, stream or Stream())
    register_block(routed, metadata)
    return routed
