"""Types of what comes from files: what configs may hold, what is refused, and in which words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, Literal

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ModelMixin, SchedulerMixin

from diffusers_dtr.config_types import built_from_file, check_types, constructor_types, read_cleaned, read_object


NESTED = json.loads("[" * 900 + "]" * 900)
CLASSES = [
    found
    for name in dir(diffusers)
    if isinstance(found := getattr(diffusers, name, None), type) and issubclass(found, (ModelMixin, SchedulerMixin))
]


def is_right(value, hint):
    try:
        check_types({"key": hint}, {"key": value}, "a file")
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("hint", "right", "wrong"),
    [
        (int, [0, -3, 2**63 - 1, np.int64(3)], [1.0, True, "1", None, [1], {}, 10**400, 2**63, -(2**63) - 1]),
        (float, [0, 1.5, -2, np.float32(1)], [True, "1", None, [1.0], math.nan, math.inf, 10**400]),
        (bool, [True, False], [0, 1, None, "true", [True]]),
        (str, ["", "a"], [0, None, ["a"], True]),
        (None, [None], [0, False, "", []]),
        (None | int, [1, None], [1.5, [None]]),
        (int | tuple[int, int], [1, [1, 2], (1, 2), [1, 2, 3]], [[1.5], ["a"], [[1]], None]),
        (tuple[int], [[], [1, 2, 3]], [1, [None], "12", {"1": 1}]),
        (Sequence[float] | None, [[0, 999], None], [[0, math.nan], "09", 5]),
        (tuple[tuple[int, ...], ...], [[[1], []]], [[1], [["a"]]]),
        (list, [[], [1, "a", [None]]], ["a", {}, 1]),
        (dict | None, [{}, {"a": [1]}, None], [[], "a"]),
        (Mapping[str, Any], [{"a": 1}], [1]),
        (dict[str, str], [{}, {"0": "cat"}], [{"0": 1}, {"0": None}, ["cat"]]),
        (Literal["a", "b"], ["a", "another, which its class refuses"], [1, None, ["a"]]),
        (np.ndarray | list[float], [np.ones(2), [0.1]], ["0.1", {}, 1]),
        (Any, [None, 1, NESTED], []),
    ],
)
def test_a_value_is_of_its_type_or_refused(hint, right, wrong):
    assert all(is_right(value, hint) for value in right)
    assert not any(is_right(value, hint) for value in [*wrong, *([] if hint in (Any, list) else [NESTED])])


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "an integer"),
        (None | float | int, "a number or null"),
        (bool | tuple[bool, ...], "true or false or a list of truth values"),
        (list[tuple[int, ...]], "a list of lists of integers"),
        (Literal["a", "b"] | None, "a string or null"),
        (dict, "an object"),
        (dict[str, str] | None, "an object of strings or null"),
        (list, "a list"),
    ],
)
def test_the_error_names_key_file_type_and_value(hint, words):
    with pytest.raises(ValueError, match=rf"^`key` of a file must be {words}, got <object object at .*>\.$"):
        check_types({"key": hint}, {"key": object()}, "a file")


@pytest.mark.parametrize("long", [10**6000, [NESTED] * 10**6, "x" * 10**6], ids=["digits", "nested", "letters"])
def test_the_error_shows_no_more_than_the_beginning_of_a_value(long):
    with pytest.raises(ValueError, match="`key`") as caught:
        check_types({"key": dict}, {"key": long}, "a file")
    assert len(str(caught.value)) < 200


INNER = {"count": int}
OUTER = {"inner": INNER, "several": [INNER]}


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"inner": {"count": "1"}}, "`count` of `inner` of"),
        ({"several": [{}, {"count": 1.5}]}, "`count` of item 1 of `several` of"),
        ({"several": [[]]}, "item 0 of `several` of"),
        ({"inner": [1]}, "`inner` of"),
        ([], ""),
    ],
)
def test_objects_of_known_keys_are_looked_into(value, place):
    check_types({"key": OUTER}, {"key": {"inner": {"count": 1, "other": "a"}, "several": [{}]}}, "a file")
    with pytest.raises(ValueError, match=f"^{place} ?`key` of a file must be "):
        check_types({"key": OUTER}, {"key": value}, "a file")


# ---- constructors


def test_the_defaults_of_every_class_of_diffusers_are_right():
    assert len(CLASSES) > 100
    for cls in CLASSES:
        parameters = signature(cls.__init__).parameters.items()
        defaults = {name: value.default for name, value in parameters if value.default is not value.empty}
        check_types(constructor_types(cls), defaults, cls.__name__)
        saved = {name: value for name, value in defaults.items() if not isinstance(value, torch.dtype)}
        check_types(constructor_types(cls), json.loads(json.dumps(saved, default=str)), cls.__name__)


class Annotated:
    def __init__(
        self,
        rope_theta: int = 10000,
        num_layers: int = 2,
        upcast: bool = False,
        wrong: float = True,
        lowest: float = -math.inf,
        plain=3,
        pair=(1, 2),
        anything=None,
    ):
        pass


def test_what_configs_hold_beyond_the_annotations_is_right():
    published = {"rope_theta": 1e6, "upcast": None, "wrong": True, "lowest": -math.inf, "plain": 2.5, "pair": [3, 4]}
    check_types(constructor_types(Annotated), {**published, "anything": [1]}, "a config")


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_layers", 2.5), ("num_layers", None), ("upcast", 1), ("lowest", math.inf), ("plain", "3"), ("pair", ["a"])],
)
def test_what_no_config_holds_is_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` of a config must be"):
        check_types(constructor_types(Annotated), {name: value}, "a config")


# ---- files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "`config.json` is not JSON"),
        (b"\xff\xfe{}", "`config.json` is not JSON"),
        (b'{"a": ' * 10**6, "`config.json` is not JSON"),
        (b'{"a": ' + b"9" * 10**4 + b"}", "`config.json` is not JSON"),
        (b"[]", "`config.json` must hold a JSON object, got list"),
        (b"null", "`config.json` must hold a JSON object, got NoneType"),
        (b'{"a": "1"}', "`a` of `config.json` must be an integer, got '1'"),
    ],
)
def test_a_file_that_holds_no_such_object_is_refused(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_object(tmp_path / "config.json", hints={"a": int})


def test_what_is_shown_to_people_is_cleaned(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a\0": None, "b\u202e": ["c\x1b", None, math.nan], "d": -math.inf, "e": 1}))
    assert read_cleaned(path, dict, None) == {"b": ["c", None, None], "e": 1}
    with pytest.raises(ValueError, match=r"^`a\.json` must be a list, got"):
        read_cleaned(path, list, None)
    assert read_cleaned(tmp_path / "none.json", dict, 3) == 3


@pytest.mark.parametrize("error", [TypeError, RecursionError])
def test_errors_of_programs_become_errors_of_values_around_files(error):
    message = rf"^A model cannot be made of these files \({error.__name__}: two lines\)\.$"
    with pytest.raises(ValueError, match=message), built_from_file("A model"):
        raise error("two \nlines")


@pytest.mark.parametrize("error", [OSError, MemoryError, torch.OutOfMemoryError])
def test_other_errors_stay_as_they_are_around_files(error):
    with pytest.raises(error, match=r"^as it is$"), built_from_file("A model"):
        raise error("as it is")
