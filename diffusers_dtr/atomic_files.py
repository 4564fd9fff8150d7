"""Atomic writes: a file is written beside its place, and renamed when it is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file atomically, over one that may exist.

    Args:
        path: The file, in a folder that exists.

    Yields:
        A path beside it, of this process alone, that ends in `.partial`. If writing fails it goes away, and what was
        at `path` stays.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8 atomically.

    Args:
        path: The file, in a folder that exists.
        text: Its contents.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
