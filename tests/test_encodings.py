"""Text is read and written as UTF-8, which is not what every locale has as default."""

import ast
from pathlib import Path

import pytest

import diffusers_dtr


PACKAGE = Path(diffusers_dtr.__file__).parent
EXAMPLES = Path(__file__).parent.parent / "examples"
FILES = sorted(path for folder in (PACKAGE, EXAMPLES) for path in folder.rglob("*.py"))


def text_without_encoding(source):
    """Lines that open a file as text, in the encoding of the locale."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or any(keyword.arg == "encoding" for keyword in call.keywords):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        modes = [value.value for value in given if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        is_binary = any("b" in mode and set(mode) <= set("rwaxb+") for mode in modes)
        owner = getattr(call.func.value, "id", None) if isinstance(call.func, ast.Attribute) else None
        is_picture = owner in ("Image", "Video", "av")
        if name in ("read_text", "write_text") or (name == "open" and not (is_binary or is_picture)):
            yield call.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_text_files_have_an_encoding(path):
    assert list(text_without_encoding(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("source", ["path.read_text()", "Path(a).write_text(b)", "open(path)", "path.open('a')"])
def test_what_has_no_encoding_is_found(source):
    assert list(text_without_encoding(f"\n{source}")) == [2]


@pytest.mark.parametrize("source", ["open(path, 'w', encoding='utf-8')", "open(path, 'rb')", "path.open(mode='ab')"])
def test_what_has_an_encoding_or_needs_none_is_passed_over(source):
    assert list(text_without_encoding(source)) == []
