"""What is not the same in all denoisers, and the config values that the routing adds to all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any, get_type_hints

from ..routing import DEFAULT_TIMESTEP_RANGE
from .routed_blocks import Stream


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
        packed: Names of sub-modules that are called with the tokens of all samples in one row. It is not known where
            one sample's end, so that adapters in them cannot be routed.
    """

    timestep: str = "timestep"
    timestep_range: tuple[float, float] | Callable[[Mapping[str, Any]], tuple[float, float]] = DEFAULT_TIMESTEP_RANGE
    blocks: Sequence[str] | None = None
    streams: Mapping[str, int | Stream] = field(default_factory=dict)
    width: str = "num_attention_heads * attention_head_dim"
    packed: frozenset[str] = frozenset()

    def range_of(self, config: Mapping[str, Any]) -> Sequence[float] | None:
        """The range that a model's config has or, where it has none, the family's."""
        given = config["routing_timestep_range"]
        if given is not None:
            return given
        return self.timestep_range(config) if callable(self.timestep_range) else self.timestep_range


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
