"""A file is replaced once the new one is complete, and only then."""

import os

import pytest

from diffusers_dtr import atomic_files
from diffusers_dtr.atomic_files import replace_text, replacing


def test_a_file_is_what_it_was_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("old", encoding="utf-8")
    with replacing(path) as partial:
        partial.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
        assert partial.suffix == ".partial"
        assert str(os.getpid()) in partial.name
    assert path.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path):
    path = tmp_path / "record.json"
    replace_text(path, "old")

    def fail_half_way():
        with replacing(path) as partial:
            partial.write_text("ne", encoding="utf-8")
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fail_half_way()
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf_8_in_every_locale(fresh_process, tmp_path):
    path = tmp_path / "record.json"
    preferred = fresh_process(
        f"""
        import json, locale, runpy
        # Alone, because the whole package takes seconds to import.
        runpy.run_path({atomic_files.__file__!r})["replace_text"]({str(path)!r}, "zw\\u00f6lf \\U0001f917")
        print(json.dumps(locale.getpreferredencoding()))
        """,
        LC_ALL="C",
        PYTHONCOERCECLOCALE="0",
        PYTHONUTF8="0",
    )
    assert preferred != "UTF-8"
    assert path.read_bytes().decode() == "zwölf 🤗"
