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
    """A place to write a file, which then replaces the one that there may be.

    Args:
        path: The file, in a folder that exists.

    Yields:
        A path beside it, of this process alone, that ends in `.partial`. If writing fails it goes away, and what was
        at `path` stays.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_text(path: str | os.PathLike, text: str) -> None:
    """Write a file of UTF-8 whatever the locale, as [`replacing`] does.

    Args:
        path: The file, in a folder that exists.
        text: All that it is to hold.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def creating(path: str | os.PathLike) -> Iterator[Path]:
    """A place to write a file or folder that is not there yet.

    Args:
        path: The file or folder. Missing folders above it are made.

    Yields:
        A path of the same name in a folder beside it, which goes away if writing fails.

    Raises:
        FileExistsError: If something of that name exists, before writing or by then.
    """
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
    """Delete a folder, which has another name, ending in `.partial`, before the first of its files is gone."""
    doomed = folder.with_name(folder.name + PARTIAL_SUFFIX)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def move_contents(source: Path, target: Path, aside: Path, last: str) -> None:
    """Move all that is in a folder into another one by renaming, and remove it.

    Args:
        source: A complete folder.
        target: Its entries of the same names are deleted at the end; others stay.
        aside: Where these are meanwhile; what is there is deleted.
        last: The entry without which nobody reads `target`. The old one is taken away first, the new one comes last.
    """
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
            f"{str(path)!r} exists already, and nothing is written over. Remove it, or choose another."
        )


def _synchronize(path: Path) -> None:
    """Have a file, or those right in a folder, on the disk: after a power cut the name could have half the content."""
    for file in [path, *path.iterdir()] if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
