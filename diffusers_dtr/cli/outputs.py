"""What commands write: never over what is there, and never a part of it under its final name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import ConfigMixin, DiffusionPipeline

from ..atomic_files import creating
from ..run_record import publishable


@contextmanager
def new_output(path: str | Path, suffix: str | None = None) -> Iterator[Path]:
    """A place to write a command's output, as [`~diffusers_dtr.atomic_files.creating`] does.

    Args:
        path: The name.
        suffix: What the name must end in.

    Raises:
        FileExistsError: If something of that name exists.
        ValueError: If it ends otherwise.
    """
    if suffix is not None and Path(path).suffix != suffix:
        raise ValueError(f"The output must end in `{suffix}`, got {str(path)!r}.")
    with creating(path) as partial:
        yield partial


def forget_local_paths(pipeline: DiffusionPipeline) -> None:
    """Take the paths of this machine out of a pipeline's configs, where diffusers keeps what it was loaded from.

    Args:
        pipeline: Its config and those of its components change. Names of repositories stay.
    """
    for part in (pipeline, *pipeline.components.values()):
        if isinstance(part, ConfigMixin) and part.config.get("_name_or_path") is not None:
            part.register_to_config(_name_or_path=publishable(part.config["_name_or_path"], "_name_or_path"))
