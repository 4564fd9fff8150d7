"""Transformers with routed blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from inspect import signature
from typing import Any

from diffusers import ModelMixin
from torch import nn

from ..diffusers_registration import block_metadata, register_block
from .derived_class import plain_type
from .routed_blocks import Stream, routed_block_class
from .scoped_model import ScopedRoutingMixin


class RoutedTransformerMixin(ScopedRoutingMixin):
    """Routes a transformer, whose blocks all have one width; to be named before the plain class."""

    @classmethod
    def _widths(cls, config: Mapping[str, Any]) -> set[int]:
        return {math.prod(config[name] for name in cls.family.widths)}

    @classmethod
    def _units(cls, model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
        lists = {name: child for name, child in model.named_modules() if isinstance(child, nn.ModuleList)}
        if cls.family.blocks is not None:
            named = cls.family.blocks
        else:
            repeated = set(cls.plain_class._repeated_blocks)
            named = [
                name
                for name, blocks in lists.items()
                # Blocks that are wrapped as well, to be refused.
                if "." not in name
                and any(type(part).__name__ in repeated for block in blocks for part in (block, *block.children()))
            ]
        if not lists.keys() >= set(named):
            there = ", ".join(name for name in lists if not any(part.isdigit() for part in name.split(".")))
            raise ValueError(
                f"`blocks` of the family of `{cls.plain_class.__name__}` must be its lists, {there}, got {named}."
            )
        if not any(len(lists[name]) for name in named):
            raise ValueError(
                f"No blocks of the `{type(model).__name__}` were found to route. Route it before they are sharded "
                "or replaced, or name them in `blocks` of its `Family`."
            )
        return [(block, cls._routed_block(plain_type(block))) for name in named for block in lists[name]]

    @classmethod
    def _routed_block(cls, plain: type[nn.Module]) -> type[nn.Module]:
        """The routed class of a block, which diffusers' caches know as they know the plain one."""
        metadata, stream = block_metadata(plain), cls.family.stream_of(plain.__name__)
        if stream is None and metadata is not None:
            # The registry's default name is not always that of the argument.
            named = metadata.hidden_states_argument_name in signature(plain.forward).parameters
            argument = metadata.hidden_states_argument_name if named else None
            stream = Stream(argument, metadata.return_hidden_states_index)
        routed = routed_block_class(plain, stream or Stream())
        register_block(routed, metadata)
        return routed

    @classmethod
    def from_transformer(cls, transformer: ModelMixin, **routing: Any) -> ModelMixin:
        """A routed model with copies of a plain one's weights, on its device, of its dtype and in its mode.

        Args:
            transformer: A model of the diffusers class that this one routes.
            **routing: Config values that the plain model does not have: `routing_alpha`, `routing_beta`, ...

        Raises:
            TypeError: If `transformer` is of another class, or for an unknown name in `routing`.
            ValueError: For a routing that does not exist.
        """
        return cls._from_plain(transformer, "transformer", routing)
