"""Checks of the sizes of tensors in a file against its bytes: a few bytes can describe gigabytes."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch


def check_archive(path: Path) -> None:
    """Refuse a compressed zip file: `torch.save` writes none, and it can grow a thousandfold."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError):
        return
    compressed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise ValueError(
            f"{path.name} must hold its tensors as `torch.save` writes them, but {compressed[0]} is compressed."
        )


def check_claims(state_dict: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse tensors that would take more memory, if copied, than the file has bytes."""
    claimed = 0
    for name, tensor in state_dict.items():
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            raise ValueError(
                f"`{name}` in {path.name} must be a dense tensor with its data, got one of layout {tensor.layout} on "
                f"the device {tensor.device.type}."
            )
        claimed += tensor.numel() * tensor.element_size()
    present = path.stat().st_size
    if claimed > present:
        raise ValueError(
            f"The tensors of {path.name} must be in the file, but they claim {claimed:,} bytes and it has "
            f"{present:,}: some of them share their data, or repeat it. Save clones of them."
        )
