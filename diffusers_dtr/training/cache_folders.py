"""Folders of what is computed once: named by what they are made of, and either complete or not there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..fingerprint import fingerprint


def content_key(description: dict[str, Any], modules: Iterable[torch.nn.Module]) -> str:
    """A name for what some models make of some input.

    Args:
        description: All that the result depends on beside the models' weights, JSON-serialisable.
        modules: The models.

    Returns:
        32 hexadecimal digits.
    """
    weights = [fingerprint(sorted(module.state_dict().items())) for module in modules]
    return hashlib.sha256(json.dumps([description, weights], sort_keys=True).encode()).hexdigest()[:32]


def build_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Make a folder unless it is there: written under another name, and renamed when it is complete.

    Args:
        folder: The folder. Runs that make it at the same time must make the same.
        write: Called with an empty folder, which it fills.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as unfinished:
        partial = Path(unfinished) / folder.name
        partial.mkdir()
        write(partial)
        _publish(partial, folder)


def _publish(partial: Path, folder: Path) -> None:
    for path in filter(Path.is_file, partial.iterdir()):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name with half of the content
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        # Another run has made the same cache meanwhile: it holds the same.
