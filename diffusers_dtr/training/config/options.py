"""What the options of a run are made of: fields that are checked by their annotations wherever values come from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import MISSING, field, fields
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from ...config_types import check_types, shortened
from ...ranges import COUNT, FINITE, NON_NEGATIVE, POSITIVE, SEED, SHARE, WHOLE, Range


Count = Annotated[int, COUNT]
Whole = Annotated[int, WHOLE]
Seed = Annotated[int, SEED]
Positive = Annotated[float, POSITIVE]
NonNegative = Annotated[float, NON_NEGATIVE]
Finite = Annotated[float, FINITE]
Share = Annotated[float, SHARE]
BelowOne = Annotated[float, Range("[0, 1)")]


def option(default: Any = MISSING, help: str | None = None, **argparse_options: Any) -> Any:
    """A field of [`Options`]: its default, its `--help`, and what else `add_argument` takes, such as `nargs`."""
    if help is not None and default not in (MISSING, None, False):
        help = f"{help} Default {default}."
    return field(default=default, metadata={"help": help, **argparse_options})


class Options:
    """Base of the parts of a run's configuration: checks every field's type, choices and range."""

    def __post_init__(self):
        hints, plain_hints = _hints(type(self), True), _hints(type(self), False)
        for name in self.names():
            value = getattr(self, name)
            if isinstance(value, os.PathLike | np.generic):
                value = value.item() if isinstance(value, np.generic) else os.fspath(value)
                object.__setattr__(self, name, value)
            if value is None and type(None) in get_args(hints[name]):
                continue
            flag = f"--{name}"
            for allowed in _limits(hints[name]):
                for item in value if isinstance(value, list | tuple) else (value,):
                    if item not in allowed:
                        among = allowed if isinstance(allowed, Range) else f"one of {', '.join(map(str, allowed))}"
                        raise ValueError(f"`{flag}` must be {among}, got {shortened(item)}.")
            check_types({flag: plain_hints[name]}, {flag: value}, "a run")

    @classmethod
    def names(cls) -> list[str]:
        """All options."""
        return [item.name for item in fields(cls)]

    def is_default(self, name: str) -> bool:
        """Whether a field has its default."""
        return getattr(self, name) == self.__dataclass_fields__[name].default

    def effect_only(self, needed: bool, condition: str, *names: str) -> None:
        """Refuse fields that were given although they have no effect; `condition` says when they have one."""
        for name in () if needed else names:
            if not self.is_default(name):
                raise ValueError(f"`--{name}` has an effect {condition} only.")


@cache
def _hints(cls: type, include_extras: bool) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=include_extras)


def _limits(hint: Any) -> Iterator[Range | tuple]:
    """The ranges and choices in an annotation."""
    if get_origin(hint) is Annotated:
        yield from (extra for extra in hint.__metadata__ if isinstance(extra, Range))
    elif get_origin(hint) is Literal:
        yield get_args(hint)
    else:
        for part in get_args(hint):
            yield from _limits(part)
