"""Classes made at run time of the classes of modules, with another forward method and nothing else changed.

Their names are those of the plain classes, because much is looked up by the name of a module's class: what must not be
split over devices, what is compiled by itself, what an engine shards, what a saved pipeline records.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, ClassVar

from torch import nn


class DerivedModule:
    """A module of a class made by [`derived_class`]; its subclasses say for what.

    Attributes:
        unrouted_class: The class that it was made of.
        made_by: The function and its arguments that make the class.
    """

    unrouted_class: ClassVar[type[nn.Module]]
    made_by: ClassVar[tuple[Callable, tuple]]

    def __reduce__(self):
        # No name leads pickle to a class that was made at run time.
        return _empty_module, self.made_by, self.__dict__


def _empty_module(make: Callable[..., type[nn.Module]], arguments: tuple) -> nn.Module:
    cls = make(*arguments)
    return cls.__new__(cls)


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or that of which its class was made."""
    return module.unrouted_class if isinstance(module, DerivedModule) else type(module)


def signed_as(plain: Callable) -> Callable[[Callable], Callable]:
    """Give a function the signature of another one.

    Unlike `functools.wraps` it leaves no way to the other: accelerate follows `__wrapped__` to the innermost function
    when it takes mixed precision off a model.
    """

    def sign(function: Callable) -> Any:
        function.__signature__ = signature(plain)
        return function

    return sign


def derived_class(
    kind: type[DerivedModule], plain: type[nn.Module], made_by: tuple[Callable, tuple], **methods: Callable
) -> type[nn.Module]:
    """A subclass of the same name.

    Args:
        kind: What it is made for.
        plain: The class that it is made of.
        made_by: The function that makes it, and its arguments.
        **methods: What it overrides, `forward` above all.
    """
    attributes = {
        "unrouted_class": plain,
        "made_by": made_by,
        "__module__": plain.__module__,
        "__doc__": plain.__doc__,
    }
    return type(plain.__name__, (kind, plain), {**attributes, **methods})
