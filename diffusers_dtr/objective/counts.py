"""Checks of arguments that count something."""

from __future__ import annotations


def is_count(value: object) -> bool:
    """Whether a value is an integer >= 1, which a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_counts(**values: object) -> None:
    """Refuse arguments that are no integers >= 1.

    Args:
        **values: By the names of the arguments.

    Raises:
        ValueError: Naming the argument and what came.
    """
    for name, value in values.items():
        if not is_count(value):
            raise ValueError(f"`{name}` must be an integer >= 1, got {value!r}.")
