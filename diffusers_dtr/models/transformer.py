"""Transformers with routed blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from inspect import signature
from typing import Any

from diffusers import ModelMixin
from torch import nn

from ..diffusers_registration import block_metadata, register_block
from .change_class import change_class
from .derived_class import plain_type
from .routed_blocks import Stream, routed_block_class
from .scoped_model import ScopedRoutingMixin


class RoutedTransformerMixin(ScopedRoutingMixin):
    """Routes a transformer, whose blocks all have one width; to be named before the plain class."""

    @classmethod
    def _widths(cls, config: Mapping[str, Any]) -> set[int]:
        return {math.prod(config[name.strip()] for name in cls.family.width.split("*"))}

    @classmethod
    def _units(cls, model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
        """The routed blocks, in order, and their routed classes."""
        if cls.family.blocks is not None:
            lists = [model.get_submodule(name) for name in cls.family.blocks]
        else:
            names = set(cls.plain_class._repeated_blocks)
            lists = [
                child
                for child in model.children()
                # Blocks that are wrapped as well, to be refused.
                if isinstance(child, nn.ModuleList)
                and any(type(part).__name__ in names for block in child for part in (block, *block.children()))
            ]
        if not any(len(blocks) for blocks in lists):
            raise ValueError(
                f"No blocks of the `{type(model).__name__}` were found to route. Route it before they are sharded "
                "or replaced, or name them in `blocks` of its `Family`."
            )
        return [(block, _routed_block(plain_type(block), cls.family.streams)) for blocks in lists for block in blocks]

    def _route_units(self, units: list[tuple[nn.Module, type[nn.Module]]]) -> None:
        for block, routed_class in units:
            change_class(block, routed_class)

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
