"""Atomic writes: files and folders are written beside their place, and renamed once they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


PARTIAL_SUFFIX = ".partial"


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path ending in `.partial`, beside the file that it replaces at the end; if writing fails, the file stays."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        with naming(path):
            yield partial
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_text(path: str | os.PathLike, text: str) -> None:
    """Replace a file by a text, in UTF-8 whatever the locale."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Name a file in an error of the operating system that names none, as those of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def creating(path: str | os.PathLike) -> Iterator[Path]:
    """A path for a new file or folder, moved to its place at the end; FileExistsError if that is taken by then."""
    path = Path(path)
    _check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-", suffix=PARTIAL_SUFFIX) as folder:
        partial = Path(folder, path.name)
        yield partial
        _synchronize(partial)
        _check_new(path)
        partial.rename(path)


def remove_folder(folder: Path) -> None:
    """Delete a folder: rename it to end in `.partial` first, so that a half-deleted one is never taken for whole.

    Of a link to a folder, the link alone is deleted.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    doomed = folder.with_name(folder.name + PARTIAL_SUFFIX)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def move_contents(source: Path, target: Path, aside: Path, last: str) -> None:
    """Move a folder's entries into another by renaming, through `aside`; `last` makes the target readable again."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if (target / last).exists():
        (target / last).rename(aside / last)
    for entry in sorted(source.iterdir(), key=lambda path: path.name == last):
        if (target / entry.name).exists():
            (target / entry.name).rename(aside / entry.name)
        entry.rename(target / entry.name)
    shutil.rmtree(aside)
    source.rmdir()


def _check_new(path: Path) -> None:
    # Also a link that leads nowhere, which a rename would replace.
    if path.exists() or path.is_symlink():
        raise FileExistsError(
            f"{str(path)!r} exists already and is not overwritten. Remove it, or choose another name."
        )


def _synchronize(path: Path) -> None:
    """Flush a file, or those right in a folder, to disk: a power cut could leave the name without the content."""
    for file in [path, *path.iterdir()] if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
