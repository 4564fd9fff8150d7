"""Outputs of commands: nothing is overwritten, and each appears only when it is complete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import ConfigMixin, DiffusionPipeline

from ..atomic_files import creating
from ..run_record import publishable


@contextmanager
def new_output(path: str | Path, suffix: str | None = None) -> Iterator[Path]:
    """A path to write a command's output to, as `creating` yields it; its name must end in `suffix`."""
    if suffix is not None and Path(path).suffix != suffix:
        raise ValueError(f"The output must end in `{suffix}`, got {str(path)!r}.")
    with creating(path) as partial:
        yield partial


def forget_local_paths(pipeline: DiffusionPipeline) -> None:
    """Take this machine's paths out of a pipeline's configs, where diffusers keeps what it was loaded from."""
    for part in (pipeline, *pipeline.components.values()):
        if isinstance(part, ConfigMixin) and part.config.get("_name_or_path") is not None:
            part.register_to_config(_name_or_path=publishable(part.config["_name_or_path"], "_name_or_path"))
