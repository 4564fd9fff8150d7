"""Type checks of configs, indexes and records, which anybody may have written.

What a value must be is read from annotations. How large it may be is not looked at: a config is trusted with its sizes
as far as diffusers trusts it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from inspect import Parameter, signature
from numbers import Integral, Real
from pathlib import Path
from reprlib import Repr
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch


# What sizes and counts are kept in by all that is built on.
_INTEGER_LIMIT = 2**63
# Singular and plural, in the words of JSON.
_NAMES = {
    bool: ("true or false", "truth values"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    list: ("a list", "lists"),
    dict: ("an object", "objects"),
    NoneType: ("null", "nulls"),
}
# What diffusers and transformers write into every config.
COMMON_TYPES = {
    "_class_name": str | list[str],
    "_diffusers_version": str,
    "_name_or_path": str | None,
    "_use_default_values": list[str],
    "quantization_config": dict | None,
}
# diffusers annotates some of these as integers, in configs they are numbers.
_FACTOR = re.compile(r"(base|mult|ratio|scale|theta)$")
# Characters of a value that an error repeats.
_SHOWN = 80
_REPR = Repr()
_REPR.maxstring = _REPR.maxother = _SHOWN
# No text has them: control characters but for tab and line feed, halves of surrogate pairs, and those that reorder
# what is around them.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def check_types(hints: Mapping[str, Any], values: Mapping[str, Any], where: str) -> None:
    """Refuse values that are not of their types; values without a hint, and hints without a value, are passed over.

    Numbers must be finite, integers must fit in 64 bits, an integer is a number too, and true is neither. How long a
    tuple is stays open, as in diffusers' annotations. Hints in a dictionary are those of an object, and a dictionary
    in a list is a list of objects.
    """
    for name, hint in hints.items():
        if name in values:
            _check(values[name], hint, f"`{name}` of {where}")


def _check(value: Any, hint: Any, what: str) -> None:
    if isinstance(hint, (dict, list)):
        _check(value, type(hint), what)
        if isinstance(hint, dict):
            check_types(hint, value, what)
        for number, item in enumerate(value if isinstance(hint, list) else ()):
            _check(item, hint[0], f"item {number} of {what}")
    elif not _is(value, hint):
        raise ValueError(f"{what} must be {_described(hint)}, got {shortened(value)}.")


@cache
def constructor_types(cls: type) -> dict[str, Any]:
    """The types of a constructor's arguments by name, widened by what published configs are known to hold."""
    annotations = get_type_hints(cls.__init__)
    hints = {}
    for name, parameter in [*signature(cls.__init__).parameters.items()][1:]:
        default = None if parameter.default is Parameter.empty else parameter.default
        hint = annotations.get(name, Any if default is None else _type_of(default))
        kinds = [*_leaves(hint)]
        if parameter.default is not Parameter.empty:
            hint = hint | _type_of(default)
        if bool in kinds:
            hint = hint | None
        if (int in kinds and _FACTOR.search(name)) or (type(default) is int and name not in annotations):
            hint = hint | float
        hints[name] = hint
    return hints


def read_object(path: Path, name: str | None = None, hints: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in a file, with values of these types."""
    return parse_object(path.read_bytes(), name or path.name, hints)


def parse_object(text: str | bytes, name: str, hints: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in a text, with values of these types; `name` is the file's in errors."""
    value = _parsed(text, name)
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must hold a JSON object, got {type(value).__name__}.")
    check_types({**COMMON_TYPES, **(hints or {})}, value, f"`{name}`")
    return value


def read_cleaned(path: Path, hint: Any, default: Any) -> Any:
    """JSON that will be shown to people, or a default if there is no such file.

    It is without control characters and null keys; NaN and infinities are null.
    """
    if not path.is_file():
        return default
    value = _parsed(path.read_bytes(), path.name, _cleaned)
    _check(value, hint, f"`{path.name}`")
    return value


def without_controls(text: str) -> str:
    """A text without control characters and surrogates, which UTF-8 cannot encode."""
    return _CONTROLS.sub("", text)


def _parsed(text: str | bytes, name: str, clean: Callable[[Any], Any] = lambda value: value) -> Any:
    try:
        return clean(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{name}` is not JSON: {_quoted(error)}") from error


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return without_controls(value)
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, dict):
        cleaned = {_cleaned(key): _cleaned(item) for key, item in value.items()}
        return {key: item for key, item in cleaned.items() if item is not None}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def built_from_file(what: str) -> Iterator[None]:
    """Turn program errors, while an object is built from a file's values, into a ValueError about the file."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{what} cannot be made of these files ({type(error).__name__}: {_quoted(error)})."
        ) from error


def shortened(value: Any) -> str:
    """A value as an error shows it."""
    try:
        text = _REPR.repr(value)  # looks at the beginning of long values only
    except ValueError:  # integers of thousands of digits, on older versions of Python
        return "an integer of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _quoted(error: BaseException) -> str:
    return f"{' '.join(str(error).split()):.300}"


def _parts(hint: Any) -> tuple[Any, list[Any]]:
    """What a hint is, of which there is one for lists, one for objects and one for unions, and its arguments."""
    origin = get_origin(hint) or hint or NoneType
    origin = {tuple: list, Sequence: list, Mapping: dict, UnionType: Union}.get(origin, origin)
    return origin, [argument for argument in get_args(hint) if argument is not Ellipsis]


def _is(value: Any, hint: Any) -> bool:
    origin, arguments = _parts(hint)
    if origin is Any:
        return True
    if origin is Union:
        return any(_is(value, argument) for argument in arguments)
    if origin is Literal:
        # Its class says better which of them it takes; what is infinite is allowed only where it is the default.
        return any(_is(value, type(argument)) or value is argument or value == argument for argument in arguments)
    if origin is list:
        kind = Union[tuple(arguments or [Any])]  # noqa: UP007 - of a variable number
        return isinstance(value, (list, tuple)) and all(_is(item, kind) for item in value)
    if origin is dict:
        key_hint, item_hint = arguments or (Any, Any)
        return isinstance(value, Mapping) and all(_is(k, key_hint) and _is(v, item_hint) for k, v in value.items())
    if isinstance(value, bool) or origin is bool:
        return isinstance(value, bool) and origin is bool
    if isinstance(value, Integral):
        return origin in (int, float) and -_INTEGER_LIMIT <= value < _INTEGER_LIMIT
    if origin is float:
        return isinstance(value, Real) and math.isfinite(value)
    return isinstance(value, origin)


def _type_of(default: Any) -> Any:
    if isinstance(default, (list, tuple)):
        return list[tuple(_type_of(item) for item in default)] if default else list
    if default is None or isinstance(default, (bool, int, float, str)):
        return Literal[default]
    return type(default)


def _leaves(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Literal:
        yield from map(type, get_args(hint))
    elif get_args(hint):
        for argument in get_args(hint):
            yield from _leaves(argument)
    else:
        yield hint


def _described(hint: Any, plural: int = 0) -> str:
    origin, arguments = _parts(hint)
    if origin in (Union, Literal):
        kinds = [type(argument) for argument in arguments] if origin is Literal else arguments
        parts = list(dict.fromkeys(_described(kind, plural) for kind in kinds))
        if _NAMES[float][plural] in parts and _NAMES[int][plural] in parts:
            parts.remove(_NAMES[int][plural])
        parts.sort(key=_NAMES[NoneType][plural].__eq__)  # last, as one reads it
        return " or ".join(parts)
    name = _NAMES[origin][plural] if origin in _NAMES else origin.__name__
    of = tuple(arguments[-1:] if origin is dict else arguments)
    return f"{name} of {_described(Union[of], 1)}" if of else name  # noqa: UP007 - of a variable number
