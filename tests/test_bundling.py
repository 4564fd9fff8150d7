"""One module from many: what is copied, in which order, and what cannot be."""

from __future__ import annotations

import sys
import textwrap

import pytest

from diffusers_dtr.bundling import bundled_source


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """Writes a package `made` of the given files and bundles `made.main.Main`."""
    monkeypatch.syspath_prepend(tmp_path)
    # Looking for a module imports the packages that it is in.
    for name in ("made", "made.inner"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def write_and_bundle(without_bases=(), **files):
        for name, text in {"__init__": "", **files}.items():
            path = tmp_path / "made" / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(textwrap.dedent(text))
        return bundled_source("made.main", "Main", without_bases)

    return write_and_bundle


def run(source):
    namespace = {"__name__": "bundled"}
    exec(compile(source, "bundled", "exec"), namespace)
    return namespace


def test_what_is_needed_is_copied_from_module_to_module_and_nothing_else(bundle):
    source = bundle(
        main="""
            from .helpers import double

            class Main:
                value = double(21)

            class Unneeded: ...
        """,
        helpers="""
            import math
            import os

            FACTOR = math.floor(2.5)
            UNNEEDED = os.sep

            def double(value):
                return FACTOR * value
        """,
    )
    names = run(source)
    assert names["Main"].value == 42
    assert {"UNNEEDED", "Unneeded", "os"}.isdisjoint(names)
    assert "made" not in source


def test_modules_come_after_those_that_they_import_and_definitions_in_their_own_order(bundle):
    source = bundle(
        main="""
            from .second import TABLE
            from .first import Base

            class Main(Base):
                table = TABLE
        """,
        second="""
            from .first import Base

            def make():
                return {"base": Base}

            TABLE = make()
        """,
        first="class Base: ...",
    )
    assert run(source)["Main"].table["base"].__name__ == "Base"


def test_a_name_that_a_package_passes_on_is_found_where_it_is_defined(bundle, tmp_path):
    (tmp_path / "made" / "inner").mkdir(parents=True)
    (tmp_path / "made" / "inner" / "__init__.py").write_text("from .deep import VALUE\n\n__all__ = ['VALUE']\n")
    (tmp_path / "made" / "inner" / "deep.py").write_text("VALUE = 3\n")
    source = bundle(main="from .inner import VALUE\n\nclass Main:\n    value = VALUE\n")
    assert run(source)["Main"].value == 3
    assert "__all__" not in source


def test_comments_docstrings_decorators_and_annotations_come_along(bundle):
    source = bundle(
        main='''
            """What main is about."""
            from __future__ import annotations

            import functools
            from collections.abc import Sequence

            X = 1  # not needed

            # Why there is a cache.
            @functools.cache
            def helper(values: Sequence[int]) -> int:
                """Adds."""
                return sum(values)  # all of them

            class Main:
                """Uses it."""

                answer = helper((1, 2))
        '''
    )
    for kept in ("# Why there is a cache.\n@functools.cache", '"""Adds."""', "# all of them", "import Sequence"):
        assert kept in source
    assert "not needed" not in source
    assert "__future__" not in source


def test_a_base_that_is_left_out_takes_what_only_it_needs_with_it(bundle):
    files = {
        "main": "from .extra import Extra\nclass Base: ...\nclass Main(\n    Extra,\n    Base,\n):\n    kept = 1\n",
        "extra": "import json\n\nclass Extra:\n    codec = json\n",
    }
    names = run(bundle(without_bases=["Extra"], **files))
    assert (names["Main"].__bases__, names["Main"].kept) == ((names["Base"],), 1)
    assert {"Extra", "json"}.isdisjoint(names)
    assert run(bundle(**files))["Main"].codec.__name__ == "json"


def test_a_class_whose_only_base_is_left_out_has_none(bundle):
    names = run(bundle(without_bases=["Extra"], main="class Extra: ...\n\nclass Main(Extra):\n    x = 1\n"))
    assert names["Main"].__bases__ == (object,)


def test_equal_definitions_of_two_modules_are_one(bundle):
    line = "import logging\n\nlogger = logging.getLogger(__name__)\n"
    source = bundle(
        main=line + "from .other import log\n\nclass Main:\n    log, logger = log, logger\n",
        other=line + "def log():\n    logger.info('')\n",
    )
    assert source.count("logger = ") == 2  # the definition, and the attribute of Main
    run(source)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"main": "from .o import f\nX = 1\nclass Main:\n    x = X, f\n", "o": "X = 2\ndef f():\n    return X\n"},
            "`X` of made.* means something else in another module",
        ),
        (
            {"main": "from .o import f\nimport re as X\nclass Main:\n    x = X, f\n", "o": "X = 2\nf = X\n"},
            "`X` of made.* means something else",
        ),
        ({"main": "class Main:\n    def f(self):\n        from .o import X\n"}, "imports from the package inside"),
        ({"main": "class Main:\n    def f(self):\n        from made.o import X\n"}, "imports from the package inside"),
        ({"main": "class Main:\n    def f(self):\n        import made.o\n"}, "imports from the package inside"),
        ({"main": "from . import o\nclass Main:\n    o = o\n", "o": ""}, "`made` has no `o` at its top level"),
        (
            {"main": "from .o import X as Y\nclass Main:\n    y = Y\n"},
            "does not import a name of the package as it is",
        ),
        ({"main": "import made.o\nclass Main: ...\n"}, "does not import a name of the package as it is"),
        ({"main": "class Main: ...\nprint()\n"}, "line 2, `print\\(\\)`, is neither an import nor a definition"),
        ({"main": "A, B = 1, 2\nclass Main: ...\n"}, "is neither an import nor a definition of one name"),
    ],
)
def test_what_cannot_be_one_module_is_an_error(bundle, files, message):
    with pytest.raises(ValueError, match=message):
        bundle(**files)


def test_a_name_that_is_not_there_is_an_error(bundle):
    with pytest.raises(ValueError, match=r"`made\.main` has no `Main` at its top level"):
        bundle(main="X = 1\n")
