"""What is not the same in all denoisers, and the config values that the routing adds to all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any, get_type_hints

from torch import nn

from ..routing import DEFAULT_TIMESTEP_RANGE, check_routing
from .routed_blocks import Stream


# Layers of diffusers' models that see text, or one row per sample, and no image.
OTHER_STREAMS = (
    r"\b(attn2\.(to_k|to_v|to_kv|k_img|v_img)|add_[qkv]_proj|to_add_out|to_added_q?kv|ff_context"
    r"|(text|image|context|guidance)_embedder|(caption|fps)_projection|(crossattn|img_context)_proj)\b"
)


@dataclass(frozen=True)
class Family:
    """What is not the same in all denoisers.

    Attributes:
        timestep: Name of the argument of the model's forward method.
        timestep_range: Its values at the cleanest and at the noisiest step, as the model's pipelines pass them, such
            as (1.0, 0.0) where 1 means clean. A function of the config where checkpoints of one class differ.
        blocks: Attributes of the model that are lists of routed blocks. None for every list of blocks whose class is
            one of the model's `_repeated_blocks`.
        streams: By class name of a block, for those of which diffusers' `TransformerBlockRegistry` does not tell it:
            the place of the image stream in the tuple that the block returns, or a [`Stream`].
        width: Config values whose product is the number of channels of the blocks.
        packed: Regular expression for layers that are called with the tokens of all samples in one row, in which
            adapters cannot be routed.
        other_streams: Regular expression for layers that see no image but text, sound, or one row per sample. Where
            timesteps are per frame or token, adapters in them have the window of the sample's noisiest one.
    """

    timestep: str = "timestep"
    timestep_range: tuple[float, float] | Callable[[Mapping[str, Any]], tuple[float, float]] = DEFAULT_TIMESTEP_RANGE
    blocks: Sequence[str] | None = None
    streams: Mapping[str, int | Stream] = field(default_factory=dict)
    width: str = "num_attention_heads * attention_head_dim"
    packed: str | None = None
    other_streams: str = OTHER_STREAMS

    def range_of(self, config: Mapping[str, Any]) -> Sequence[float] | None:
        """The range that a model's config has or, where it has none, the family's."""
        given = config.get("routing_timestep_range")
        if given is not None:
            return given
        return self.timestep_range(config) if callable(self.timestep_range) else self.timestep_range

    def stream_of(self, block_name: str) -> Stream | None:
        """What is declared of a block."""
        stream = self.streams.get(block_name)
        return Stream(output=stream) if isinstance(stream, int) else stream

    @property
    def widths(self) -> list[str]:
        """The names in `width`."""
        return [name.strip() for name in str(self.width).split("*")]


def check_family(family: Family, plain: type[nn.Module], of_unet: bool) -> None:
    """Refuse a declaration that does not fit the class that it is made for, as far as the class alone tells."""

    def check(name: str, is_right: Any, allowed: str) -> None:
        if not is_right:
            value = getattr(family, name)
            raise ValueError(f"`{name}` of the family of `{plain.__name__}` must be {allowed}, got {value!r}.")

    if not isinstance(family, Family):
        raise TypeError(f"`family` of `{plain.__name__}` must be a `Family`, got {family!r}.")
    arguments, config = (
        {name: value for name, value in signature(method).parameters.items() if name != "self"}
        for method in (plain.forward, plain.__init__)
    )
    check("timestep", family.timestep in arguments, f"an argument of `{plain.__name__}.forward`, {_listed(arguments)}")
    try:
        given = family.range_of({name: p.default for name, p in config.items() if p.default is not Parameter.empty})
        check_routing(timestep_range=given)
    except KeyError as error:  # perhaps of a value without a default
        check("timestep_range", error.args[0] in config, f"made of values of its config, {_listed(config)}")
    except ValueError:
        check("timestep_range", False, "(cleanest, noisiest), two different finite timesteps")
    for name in ("packed", "other_streams"):
        try:
            re.compile(getattr(family, name) or "")
        except (re.error, TypeError):
            check(name, False, "a regular expression")
    if of_unet:
        for name in ("blocks", "streams", "width"):
            check(name, getattr(family, name) == getattr(Family(), name), "left out: a U-Net's units are known")
        check("width", "block_out_channels" in config, "that of a U-Net, whose config has `block_out_channels`")
        return
    check("width", _are_names(family.widths, config), f"a product of values of its config, {_listed(config)}")
    if family.blocks is None:
        check("blocks", plain._repeated_blocks, "given, because the model has no `_repeated_blocks`")
    else:
        check("blocks", family.blocks and _are_names(family.blocks), "a list of names of its attributes")
    # Its own blocks last, which count where others have the same name.
    ordered = sorted(_module_classes(), key=lambda cls: cls.__module__ == plain.__module__)
    classes = {cls.__name__: cls for cls in ordered}
    own = [name for name, cls in classes.items() if cls.__module__ == plain.__module__]
    check("streams", _are_names([*family.streams], classes), f"by class names of blocks, such as {_listed(own)}")
    for name in family.streams:
        stream, taken = family.stream_of(name), [*signature(classes[name].forward).parameters][1:]
        is_right = isinstance(stream, Stream) and stream.argument in (None, *taken)
        is_right = is_right and all(type(n) is int and n >= 0 for n in (stream.output or 0, stream.batch_dim))
        allowed = f"places from 0 on, or each a `Stream` of an argument of `{name}`, {_listed(taken)}"
        check("streams", is_right, allowed)


def _are_names(names: Any, known: Collection[str] | None = None) -> bool:
    are_strings = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return are_strings and (known is None or set(names) <= set(known))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "of which there are none"


def _module_classes(base: type[nn.Module] = nn.Module) -> Iterator[type[nn.Module]]:
    """All classes of modules that there are; those of a class's blocks are there when it is."""
    for cls in base.__subclasses__():
        yield cls
        yield from _module_classes(cls)


def _routing_config(
    *,
    routing_alpha: float = 4.0,
    routing_beta: float = 0.8,
    routing_type: str = "dtr",
    routing_seed: int = 0,
    routing_timestep_range: Sequence[float] | None = None,
) -> None:
    """The config values that a routed model has beside those of the plain one."""


ROUTING_PARAMETERS = signature(_routing_config).parameters
ROUTING_TYPES = get_type_hints(_routing_config)


def routing_parameters(family: Family) -> dict[str, Parameter]:
    """The arguments of the routing in the constructors of a family."""
    known = family.timestep_range != DEFAULT_TIMESTEP_RANGE and not callable(family.timestep_range)
    default = family.timestep_range if known else None
    window = ROUTING_PARAMETERS["routing_timestep_range"].replace(default=default)
    return {**ROUTING_PARAMETERS, "routing_timestep_range": window}


def check_routing_names(routing: Mapping[str, Any]) -> None:
    """Refuse what is no config value of the routing."""
    unknown = routing.keys() - ROUTING_PARAMETERS.keys()
    if unknown:
        known = ", ".join(f"`{name}`" for name in ROUTING_PARAMETERS)
        raise TypeError(f"Routing has no `{min(unknown)}`; it has {known}.")
