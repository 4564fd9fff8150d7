"""Ranges of numbers: one declaration serves an argument's check, its error message and its command-line flag."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from numbers import Real


__all__ = ["COUNT", "FINITE", "NON_NEGATIVE", "POSITIVE", "SEED", "SHARE", "WHOLE", "Range"]

_INTERVAL = re.compile(r"([\[(])([^,\s]+),\s*([^,\s]+)([\])])")


@dataclass(frozen=True)
class Range:
    """An interval of numbers, such as `Range("(0, 1]")`, or of integers, such as `Range("[0, 2^32)", int)`.

    `value in range` tests, [`check`] raises an error, and calling a range parses text, as `type=` of `argparse` does.
    No range has NaN or bools in it; infinity is in those that are closed there, and is the limit where there is none.
    """

    interval: str
    kind: type = float

    def __post_init__(self):
        self._borders()

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else Real) or value != value:
            return False
        opening, low, high, closing = self._borders()
        above = value >= low if opening == "[" else value > low
        return above and (value <= high if closing == "]" else value < high)

    def __str__(self) -> str:
        opening, low, high, closing = self._borders()
        noun = "an integer" if self.kind is int else "a number"
        if high < math.inf or closing == "]" or low == -math.inf:
            return f"{noun} in {self.interval}"
        return f"{noun} {'>=' if opening == '[' else '>'} {low:g}"

    def check(self, **values: object) -> None:
        """Raise a ValueError for values outside this range, which names the argument, the range, and what came."""
        for name, value in values.items():
            if value not in self:
                raise ValueError(f"`{name}` must be {self}, got {value!r}.")

    def __call__(self, text: str) -> int | float:
        """Parse a number, as `type=` of an argument of argparse."""
        try:
            value = self.kind(text)
        except ValueError:
            value = text
        if value not in self:
            raise argparse.ArgumentTypeError(f"must be {self}, got {value!r}")
        return value

    def _borders(self) -> tuple[str, float, float, str]:
        match = _INTERVAL.fullmatch(self.interval)
        if match is None:
            raise ValueError(f"`interval` must be such as '(0, 1]' or '[1, inf)', got {self.interval!r}.")
        opening, low, high, closing = match.groups()
        return opening, _number(low), _number(high), closing


def _number(text: str) -> int | float:
    base, _, exponent = text.partition("^")
    return int(base) ** int(exponent) if exponent else float(text)


COUNT = Range("[1, inf)", int)
WHOLE = Range("[0, inf)", int)
POSITIVE = Range("(0, inf)")
NON_NEGATIVE = Range("[0, inf)")
FINITE = Range("(-inf, inf)")
SHARE = Range("[0, 1]")
SEED = Range("[0, 2^63)", int)
