"""Classes of routed blocks, made of the classes that they route.

Their names are those of the plain classes, because much is looked up by the name of a block's class: what must not be
split over devices, what is compiled by itself, what an engine shards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import nn

from ..routing import routed_residual
from .scope import channel_mask, token_mask


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


class RoutedModule:
    """A module of a class made by [`routed_block_class`] or [`masked_class`].

    Attributes:
        plain_class: The class that is routed.
    """

    plain_class: ClassVar[type[nn.Module]]

    def __reduce__(self):
        # Classes made at run time are under no name where pickle could find them.
        return _empty_module, (*self._made_of(),), self.__dict__

    @classmethod
    def _made_of(cls) -> tuple:
        """Function and arguments that make the class."""
        raise NotImplementedError


def _empty_module(make: Any, *arguments: Any) -> nn.Module:
    cls = make(*arguments)
    return cls.__new__(cls)


class _RoutedBlock(RoutedModule):
    """A block that is routed as a whole: its image stream is masked, and the other channels are carried past it."""

    stream: ClassVar[Stream]

    @classmethod
    def _made_of(cls) -> tuple:
        return routed_block_class, cls.plain_class, cls.stream


@cache
def routed_block_class(plain: type[nn.Module], stream: Stream) -> type[nn.Module]:
    """The routed class of a residual block.

    Args:
        plain: Class of the block, which has its own residual connections.
        stream: Where its image stream is.

    Returns:
        A subclass of the same name, and of the same parameters and outputs.

    Raises:
        ValueError: If the block has no such argument.
    """
    arguments, plain_forward = list(signature(plain.forward).parameters)[1:], plain.forward
    name = stream.argument or arguments[0]
    if name not in arguments:
        raise ValueError(f"`argument` must be one of `{plain.__name__}`: {', '.join(arguments)}, got {name!r}.")
    position = arguments.index(name)

    @wraps(plain_forward, assigned=())
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base class's block with the active channels of its image stream."""
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
        place = _place(plain, stream, output)
        return (*output[:place], image, *output[place + 1 :])

    return _made(_RoutedBlock, plain, forward, stream=stream)


def _place(plain: type[nn.Module], stream: Stream, output: tuple) -> int:
    if stream.output is None:
        raise TypeError(
            f"`{plain.__name__}` returns {len(output)} values: the model's `Family` must say in `streams` which of "
            "them is the image stream."
        )
    return stream.output


class _MaskedInput(RoutedModule):
    """A module that sees only the active channels of `(batch, channels, ...)`."""

    @classmethod
    def _made_of(cls) -> tuple:
        return masked_class, cls.plain_class


@cache
def masked_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The class of a module that sees only the active channels of its input, such as the first norm of a branch.

    Args:
        plain: Class of the module, called with `(batch, channels, ...)` alone.

    Returns:
        A subclass of the same name.
    """
    plain_forward = plain.forward

    @wraps(plain_forward, assigned=())
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Call the base class's module with the active channels of `(batch, channels, ...)`."""
        mask = channel_mask(hidden_states)
        return plain_forward(self, hidden_states if mask is None else hidden_states * mask)

    return _made(_MaskedInput, plain, forward)


def _made(mixin: type[RoutedModule], plain: type[nn.Module], forward: Callable, **attributes: Any) -> type[nn.Module]:
    attributes |= {
        "plain_class": plain,
        "forward": forward,
        "__module__": plain.__module__,
        "__doc__": plain.__doc__,
    }
    return type(plain.__name__, (mixin, plain), attributes)
