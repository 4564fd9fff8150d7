"""What commands say and write: never over what is there, and never a part of it under its final name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from diffusers import ConfigMixin, DiffusionPipeline

from ..publishing import publishable


def printable(text: str) -> str:
    """A text without what a terminal would take for commands: files may hold anything."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


@contextmanager
def new_output(path: str | Path, suffix: str | None = None) -> Iterator[Path]:
    """A place to write a file or folder, which gets its name once all of it is written.

    Args:
        path: The name. Missing folders above it are made.
        suffix: What the name must end in.

    Yields:
        A path of the same name in a folder beside it, which goes away if writing fails.

    Raises:
        ValueError: If something of that name exists, or it ends otherwise.
    """
    path = Path(path)
    _check_new(path)
    if suffix is not None and path.suffix != suffix:
        raise ValueError(f"The output must end in `{suffix}`, got {str(path)!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-", suffix=".partial") as folder:
        yield Path(folder) / path.name
        _check_new(path)
        (Path(folder) / path.name).rename(path)


def _check_new(path: Path) -> None:
    # Also a link that leads nowhere, which a rename would replace.
    if path.exists() or path.is_symlink():
        raise ValueError(f"{str(path)!r} exists already, and nothing is written over. Remove it, or choose another.")


def forget_local_paths(pipeline: DiffusionPipeline) -> None:
    """Take the paths of this machine out of a pipeline's configs, where diffusers keeps what it was loaded from.

    Args:
        pipeline: Its config and those of its components change. Names of repositories stay.
    """
    for part in (pipeline, *pipeline.components.values()):
        if isinstance(part, ConfigMixin) and part.config.get("_name_or_path") is not None:
            part.register_to_config(_name_or_path=publishable(part.config["_name_or_path"], "_name_or_path"))
