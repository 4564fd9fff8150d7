"""Caches on disk: their keys, and folders that are written atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from .atomic_files import creating


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of the names, types, shapes and values of tensors, in their order: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def content_key(description: dict[str, Any], modules: Iterable[torch.nn.Module]) -> str:
    """The cache key of what some models make of some input: 32 hexadecimal digits."""
    weights = [fingerprint(sorted(module.state_dict().items())) for module in modules]
    return hashlib.sha256(json.dumps([description, weights], sort_keys=True, default=str).encode()).hexdigest()[:32]


def build_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Make a folder unless it is there, by an atomic write; concurrent runs must write the same into it."""
    if folder.exists():
        return
    try:
        with creating(folder) as partial:
            partial.mkdir()
            write(partial)
    except OSError:
        if not folder.exists():  # else another run has made the same cache meanwhile
            raise
