"""Changes the class of a module that is there already, hooks and all.

accelerate's and diffusers' hooks replace a module's forward method and hold on to the one of its class. There is no
public way to give them another: this is the one place that knows where they keep it.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import unwrap
from types import MethodType
from typing import Any

from torch import nn


def check_class_can_change(model: nn.Module) -> None:
    """Refuse a model with a module whose forward method was replaced by something unknown.

    Raises:
        TypeError: Saying what was found.
    """
    for module in model.modules():
        if "forward" in vars(module) and not any(_held_forwards(module)):
            replaced = vars(module)["forward"]
            name = getattr(replaced, "__qualname__", None) or type(replaced).__name__
            raise TypeError(
                f"The forward method of a `{type(module).__name__}` was replaced by `{name}`, "
                "which is no hook of accelerate or diffusers. Route the model before that, or unwrap it first, as "
                "`accelerator.unwrap_model(model, keep_fp32_wrapper=False)` does."
            )


def change_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Make a module one of another class with the same attributes.

    Args:
        module: Which [`check_class_can_change`] has passed.
        new: A subclass of its class, or the class of which it is a subclass.
    """
    held = list(_held_forwards(module))
    module.__class__ = new
    for holder, name in held:
        holder[name] = MethodType(new.forward, module)


def _held_forwards(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the forward method of the module's class is held, as dictionaries and keys."""
    hooks = vars(module).get("_diffusers_hook")
    # accelerate leaves the undecorated one behind when it takes mixed precision off a model.
    own = (type(module).forward, unwrap(type(module).forward))
    holders = [vars(module), *(vars(reference) for reference in (hooks._fn_refs if hooks else ()))]
    for holder in holders:
        for name in ("forward", "_old_forward", "original_forward"):
            method = holder.get(name)
            if isinstance(method, MethodType) and method.__func__ in own:
                yield holder, name
