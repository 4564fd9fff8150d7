"""JSON of files that others may have written, with the types that are expected of it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any


NUMBER = (int, float)

# No text has them: control characters but for tab and line feed, halves of surrogate pairs, and those that reorder
# what is around them.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def read_json(path: Path, types: Any, default: Any) -> Any:
    """The content of a file, as [`parse_json`] gives it.

    Args:
        path: The file.
        types: As in [`parse_json`].
        default: What is returned if there is no such file.
    """
    return parse_json(path.read_bytes(), types, path.name) if path.is_file() else default


def parse_json(text: str | bytes, types: Any, name: str) -> Any:
    """Parse JSON and check its types.

    Args:
        text: The JSON, in UTF-8.
        types: What is expected: a type or a tuple of types, `[types]` for a list, or a dictionary with the types of
            some keys, or of all others under the key `...`. Values of other keys are not looked at; any may be
            missing or null. Null in a list is of the type `NoneType`.
        name: What is read, for messages.

    Returns:
        The content, without keys that are null and without control characters; NaN and infinities are null.

    Raises:
        ValueError: If it is not JSON, or of other types.
    """
    try:
        content = _cleaned(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be JSON: {error}") from error
    _check(content, types, name)
    return content


def without_controls(text: str) -> str:
    """A text without control characters and halves of characters, which UTF-8 has no bytes for."""
    return _CONTROLS.sub("", text)


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return without_controls(value)
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, dict):
        cleaned = {_cleaned(key): _cleaned(item) for key, item in value.items()}
        return {key: item for key, item in cleaned.items() if item is not None}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check(value: Any, types: Any, where: str) -> None:
    allowed = types if isinstance(types, tuple) else (type(types) if isinstance(types, (dict, list)) else types,)
    if type(value) not in allowed or (type(value) is int and abs(value) >= 2**63):
        names = " or ".join({"str": "text", "dict": "an object"}.get(kind.__name__, kind.__name__) for kind in allowed)
        raise ValueError(f"`{where}` must be {names}, got {value!r:.60}.")
    if isinstance(types, list):
        for number, item in enumerate(value):
            _check(item, types[0], f"{where}[{number}]")
    elif isinstance(types, dict):
        for key, item in value.items():
            expected = types.get(key, types.get(...))
            if expected is not None:
                _check(item, expected, f"{where}: {key}")
