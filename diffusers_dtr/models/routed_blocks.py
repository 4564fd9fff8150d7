"""Classes of routed blocks, made of the classes that they route."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn

from ..routing import routed_residual
from .derived_class import DerivedModule, derived_class, signed_as
from .scope import token_mask


@dataclass(frozen=True)
class Stream:
    """Where a block's image stream comes in and goes out.

    Attributes:
        argument: Name of the block's argument. None for the first.
        output: Its place in the tuple that the block returns. Of no account where the block returns it alone.
        batch_dim: Its axis of samples.
    """

    argument: str | None = None
    output: int | None = None
    batch_dim: int = 0


class RoutedBlock(DerivedModule):
    """A module whose channels are routed: a block, or the norm that a residual branch begins with."""


@cache
def routed_block_class(plain: type[nn.Module], stream: Stream) -> type[nn.Module]:
    """The routed class of a block, which has its own residual connections; a TypeError for a wrapper around one."""
    plain_forward = plain.forward
    _, *parameters = signature(plain_forward).parameters.values()
    if all(parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD) for parameter in parameters):
        raise TypeError(f"A `{plain.__name__}` wraps a block, whose arguments it hides. Route the model before that.")
    arguments = [parameter.name for parameter in parameters]
    name = stream.argument or arguments[0]
    position = arguments.index(name)

    @signed_as(plain_forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden_states = kwargs[name] if name in kwargs else args[position]
        output = None

        def image_stream(masked: torch.Tensor) -> torch.Tensor:
            nonlocal output
            if name in kwargs:
                output = plain_forward(self, *args, **{**kwargs, name: masked})
            else:
                output = plain_forward(self, *args[:position], masked, *args[position + 1 :], **kwargs)
            return output if torch.is_tensor(output) else output[_place(plain, stream, output)]

        image = routed_residual(image_stream, hidden_states, token_mask(hidden_states, stream.batch_dim))
        if torch.is_tensor(output):
            return image
        return (*output[: stream.output], image, *output[stream.output + 1 :])

    return derived_class(RoutedBlock, plain, (routed_block_class, (plain, stream)), forward=forward)


def _place(plain: type[nn.Module], stream: Stream, output: tuple) -> int:
    if stream.output is None or stream.output >= len(output):
        raise TypeError(
            f"`{plain.__name__}` returns {len(output)} values: `streams` of the model's `Family` must say which of "
            f"them, from 0 on, is the image stream, got {stream.output}."
        )
    return stream.output


@cache
def masked_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The class of a module `(batch, channels, ...)` that sees only active channels, such as a branch's first norm."""
    plain_forward = plain.forward

    @signed_as(plain_forward)
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        mask = token_mask(hidden_states, channel_dim=1)
        return plain_forward(self, hidden_states if mask is None else hidden_states * mask)

    return derived_class(RoutedBlock, plain, (masked_class, (plain,)), forward=forward)
