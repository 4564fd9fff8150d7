"""Folders of what is computed once: named by what they are made of, and either complete or not there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..atomic_files import creating
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
    try:
        with creating(folder) as partial:
            partial.mkdir()
            write(partial)
    except OSError:
        # Another run may have made the same cache meanwhile: it holds the same.
        if not folder.exists():
            raise
