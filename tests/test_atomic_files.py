"""Files and folders have their names once they are complete, and only then."""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from diffusers_dtr import atomic_files
from diffusers_dtr.atomic_files import creating, move_contents, naming, remove_folder, replace_text, replacing


@pytest.mark.parametrize("fails", [False, True])
def test_a_file_is_what_it_was_until_the_new_one_is_complete_and_if_that_fails(fails, tmp_path):
    path = tmp_path / "record.json"
    replace_text(path, "old")
    with suppress(ZeroDivisionError), replacing(path) as partial:
        partial.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
        assert partial.suffix == ".partial"
        assert str(os.getpid()) in partial.name
        assert 1 / (not fails)
    assert path.read_text(encoding="utf-8") == ("old" if fails else "new")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no file that is always full")
def test_an_error_that_names_no_file_is_given_its_name():
    with pytest.raises(OSError, match="/dev/full") as caught, naming("/dev/full"):
        Path("/dev/full").write_text("text", encoding="utf-8")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(FileNotFoundError, match="nowhere"), naming("file"):
        Path("nowhere").read_text(encoding="utf-8")


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


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_what_is_there_is_refused_before_work(there, tmp_path):
    path = tmp_path / "output"
    {"file": path.touch, "folder": path.mkdir, "link": lambda: path.symlink_to(tmp_path / "nowhere")}[there]()
    with pytest.raises(FileExistsError, match="exists already and is not overwritten"):
        creating(path).__enter__()


def test_what_somebody_else_wrote_meanwhile_is_not_written_over(tmp_path):
    path = tmp_path / "grid.png"
    with pytest.raises(FileExistsError, match="exists already"), creating(path) as partial:
        (partial.write_text("ours"), path.write_text("theirs"))
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_on_the_disk_before_they_or_their_folder_have_their_name(tmp_path, monkeypatch):
    folder, file = tmp_path / "below" / "cache", tmp_path / "file"
    written = []

    def fsync(descriptor):
        assert not (folder if len(written) < 2 else file).exists()
        written.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    with creating(folder) as partial:
        partial.mkdir()
        (partial / "a").touch()
        (partial / "b").touch()
    with creating(file) as partial:
        partial.touch()
    assert sorted(written) == sorted(path.stat().st_ino for path in [folder / "a", folder / "b", file])


def test_a_folder_has_another_name_before_the_first_of_its_files_is_gone(tmp_path, monkeypatch):
    folder, doomed = tmp_path / "checkpoint-1", tmp_path / "checkpoint-1.partial"
    folder.mkdir()
    doomed.mkdir()  # of a process that died here
    rmtree = shutil.rmtree

    def watched(path, **options):
        assert path == doomed
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []


def test_contents_that_are_moved_replace_those_of_the_same_name_and_leave_the_others(tmp_path):
    for path in ("new/index", "new/a", "old/index", "old/a", "old/b", "aside/c"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(path)
    move_contents(tmp_path / "new", tmp_path / "old", tmp_path / "aside", last="index")
    moved = {path.name: path.read_text() for path in (tmp_path / "old").iterdir()}
    assert moved == {"index": "new/index", "a": "new/a", "b": "old/b"}
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
