import argparse
import math
import re

import numpy as np
import pytest

from diffusers_dtr.ranges import COUNT, Range


@pytest.mark.parametrize(
    ("interval", "kind", "inside", "outside"),
    [
        ("(0, 1]", float, [1e-300, 0.5, 1, np.float32(1)], [0, 1.0000001, math.inf, math.nan, True, "0.5", None]),
        ("[0, 1)", float, [0, 0.999], [-1e-300, 1.0, -math.inf]),
        ("(0, inf]", float, [math.inf], [0, math.nan]),
        ("(-inf, inf)", float, [-1e308, 0], [math.inf, -math.inf, math.nan]),
        ("[-1.5, 2.5e1)", float, [-1.5, 24.9], [-1.6, 25]),
        ("[1, inf)", int, [1, 10**400], [0, -1, 1.0, True, "1", None]),
        ("[0, 2^63)", int, [0, 2**63 - 1], [-1, 2**63]),
    ],
)
def test_range_ends_where_its_interval_ends(interval, kind, inside, outside):
    numbers = Range(interval, kind)
    assert [value for value in inside if value not in numbers] == []
    assert [value for value in outside if value in numbers] == []


@pytest.mark.parametrize("interval", ["", "0, 1", "[0; 1]", "[a, 1]", "[0, 1", "[0, 1]]"])
def test_what_is_no_interval_is_refused_at_once(interval):
    with pytest.raises(ValueError, match=r"`interval` must be such as|could not convert|invalid literal"):
        Range(interval)


@pytest.mark.parametrize(
    ("numbers", "value", "message"),
    [
        (COUNT, 0, "`steps` must be an integer >= 1, got 0."),
        (Range("(0, inf)"), -2.0, "`steps` must be a number > 0, got -2.0."),
        (Range("(0, 1]"), math.nan, "`steps` must be a number in (0, 1], got nan."),
        (Range("(-inf, inf)"), math.inf, "`steps` must be a number in (-inf, inf), got inf."),
        (Range("[0, 2^32)", int), "7", "`steps` must be an integer in [0, 2^32), got '7'."),
    ],
)
def test_error_names_the_argument_what_is_allowed_and_what_came(numbers, value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        numbers.check(steps=value)


def test_text_becomes_a_number_of_the_range():
    assert (COUNT("12"), Range("[0, 1]")("1e-3"), type(Range("[0, 1]")("1"))) == (12, 1e-3, float)
    for text in ("0", "1.0", "many", "", "nan", "9" * 5000):
        with pytest.raises(argparse.ArgumentTypeError, match="must be an integer >= 1, got"):
            COUNT(text)
