"""Files that are there whole or not at all: written beside their place, which they take once they are complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
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
