"""Classes made at run time of the classes of modules, and modules that become of another class, hooks and all.

Names are those of the plain classes, because much is looked up by the name of a module's class: what must not be split
over devices, what is compiled by itself, what an engine shards, what a saved pipeline records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature, unwrap
from types import MethodType
from typing import Any, ClassVar

from torch import nn


class DerivedModule:
    """A module of a class made by [`derived_class`] of its `unrouted_class`; its subclasses say for what."""

    unrouted_class: ClassVar[type[nn.Module]]
    # The function and its arguments that make the class.
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
    """Give a function the signature of another one, and no way to it, as `functools.wraps` does.

    accelerate follows `__wrapped__` to the innermost function when it takes mixed precision off a model.
    """

    def sign(function: Callable) -> Any:
        function.__signature__ = signature(plain)
        return function

    return sign


def derived_class(
    kind: type[DerivedModule], plain: type[nn.Module], made_by: tuple[Callable, tuple], **methods: Callable
) -> type[nn.Module]:
    """A subclass of the same name, made by the function and the arguments `made_by`, that overrides some methods."""
    about = {"unrouted_class": plain, "made_by": made_by, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (kind, plain), {**about, **methods})


def check_class_can_change(model: nn.Module) -> None:
    """Refuse a model with a module whose forward method was replaced by something unknown."""
    for module in model.modules():
        if "forward" in vars(module) and not any(_held_forwards(module)):
            replaced = vars(module)["forward"]
            name = getattr(replaced, "__qualname__", None) or type(replaced).__name__
            raise TypeError(
                f"The forward method of a `{type(module).__name__}` was replaced by `{name}`, which is no hook of "
                "accelerate or diffusers. Route it before that, or after `accelerator.unwrap_model(model, "
                "keep_fp32_wrapper=False)`."
            )


def change_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Make a module, which [`check_class_can_change`] has passed, one of a subclass, or of the class it subclasses."""
    held = list(_held_forwards(module))
    module.__class__ = new
    for holder, name in held:
        holder[name] = MethodType(new.forward, module)


def _held_forwards(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where accelerate's and diffusers' hooks hold the forward method that they replaced, as dictionaries and keys."""
    hooks = vars(module).get("_diffusers_hook")
    # accelerate leaves the undecorated one behind when it takes mixed precision off a model.
    own = (type(module).forward, unwrap(type(module).forward))
    holders = [vars(module), *(vars(reference) for reference in (hooks._fn_refs if hooks else ()))]
    for holder in holders:
        for name in ("forward", "_old_forward", "original_forward"):
            method = holder.get(name)
            if isinstance(method, MethodType) and method.__func__ in own:
                yield holder, name
