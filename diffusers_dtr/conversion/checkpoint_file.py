"""Reading of checkpoint files of the original DiT, DTR and ANT code, without executing code in them.

They are pickles, which can name any function to call, and hold objects of argparse and OmegaConf beside weights.
torch's restricted unpickler calls only what makes tensors; for the classes of those objects it is handed stand-ins,
which keep their state as data. Any other name is refused.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from .masks import MASK_BUFFER
from .run_settings import Recorded, Setting, read_settings


CHECKPOINT_WEIGHTS = ("ema", "model")


def _plain_dict(*args) -> dict:
    # The restricted unpickler puts items into real dictionaries only.
    return {}


_RECORDED = {
    "argparse": "Namespace",
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": "AnyNode BooleanNode BytesNode FloatNode IntegerNode PathNode StringNode "
    "InterpolationResultNode",
    # Types and paths that these refer to. `builtins` goes by its name in Python 2 in a pickle, and by this one here.
    "builtins": "bool bytes dict float int list object str tuple",
    "pathlib": "PosixPath WindowsPath",
    "typing": "Any Dict List",
}
_STAND_INS = [(Recorded, f"{module}.{name}") for module, names in _RECORDED.items() for name in names.split()]
_STAND_INS.append((_plain_dict, "collections.defaultdict"))


def load_original_checkpoint(path: str | Path, weights: str | None = None) -> dict[str, torch.Tensor]:
    """Read a state dict from a file of the original DiT, DTR or ANT code; nothing in the file is executed.

    Args:
        path: A file written by `torch.save`, with a state dict or with "ema", "model" and more, or a `.safetensors`
            file with a state dict. It is mapped into memory where its format allows, and read as tensors are used.
        weights: "ema" (the averaged weights, which the authors sample from) or "model", for a file that has more than
            one state dict. Defaults to "ema".

    Returns:
        The tensors by their names in the file, on the CPU.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it names anything that is neither a tensor nor the arguments of a run (the error names it), is
            damaged, or does not hold these weights.
    """
    return read_original_checkpoint(path, weights).state_dict


class OriginalCheckpoint(NamedTuple):
    """A state dict, and the settings of its run by their paths: None where the file is a state dict alone."""

    state_dict: dict[str, torch.Tensor]
    settings: dict[str, Setting] | None


def read_original_checkpoint(path: str | Path, weights: str | None = None) -> OriginalCheckpoint:
    """Read weights and settings of a file; see `load_original_checkpoint` for arguments and errors."""
    if weights is not None and weights not in CHECKPOINT_WEIGHTS:
        raise ValueError(f"`weights` must be one of {', '.join(CHECKPOINT_WEIGHTS)}, got {weights!r}.")
    path = Path(path)
    checkpoint = _load(path)
    is_single = _is_state_dict(checkpoint)
    held = checkpoint if isinstance(checkpoint, Mapping) and not is_single else {None: checkpoint}
    state_dicts = {name: value for name, value in held.items() if _is_state_dict(value)}
    for state_dict in state_dicts.values():
        _check_claims(state_dict, path)
    if is_single:
        if weights is not None:
            raise ValueError(f"`weights` must be left out: {path.name} is a single state dict, got {weights!r}.")
        return OriginalCheckpoint(dict(checkpoint), None)
    weights = weights or "ema"
    if weights not in state_dicts:
        named = ", ".join(map(repr, state_dicts)) or "none"
        raise ValueError(f"`weights`={weights!r} must name a state dict in {path.name}, which has {named}.")
    return OriginalCheckpoint(dict(checkpoint[weights]), read_settings(checkpoint))


def _is_state_dict(value: Any) -> bool:
    items = value.items() if isinstance(value, Mapping) else ()
    return bool(items) and all(isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in items)


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        compressed = _compressed_members(path)
        if not compressed:
            return _load_restricted(path)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # damaged and hostile files lead the unpickler into errors of almost every type
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise ValueError(
                f"{path.name} is not a checkpoint of tensors, or is damaged ({type(error).__name__})."
            ) from error
        # Without its cause, which advises to switch the protection off.
        raise ValueError(
            f"{path.name} names `{refused[1]}`, which is neither a tensor nor a known part of a run's arguments. A "
            "checkpoint can have any code run in this way, so nothing of it was loaded. Whoever made it can save its "
            "state dict alone, best as safetensors."
        ) from None
    raise ValueError(
        f"{path.name} must hold its tensors as `torch.save` writes them, but {compressed[0]} is compressed."
    )


def _load_restricted(path: Path) -> Any:
    with torch.serialization.safe_globals(_STAND_INS):
        # What was saved before torch 1.6 is no zip file, and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))


def _is_zip(path: Path) -> bool:
    """As torch tells it."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


# ---- a few bytes can describe gigabytes


def _compressed_members(path: Path) -> list[str]:
    """Members of a zip file that may grow a thousandfold; `torch.save` writes none. What only torch can read fails."""
    if not _is_zip(path):
        return []
    with zipfile.ZipFile(path) as archive:
        return [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]


def _check_claims(state_dict: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse tensors that would take more memory, if copied, than the file has bytes."""
    for name, tensor in state_dict.items():
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            raise ValueError(
                f"`{name}` in {path.name} must be a dense tensor with its data, got one of layout {tensor.layout} on "
                f"the device {tensor.device.type}."
            )
    # All blocks may share one table of masks, which is read once and never copied.
    copied = {id(value) if name.endswith(f".{MASK_BUFFER}") else name: value for name, value in state_dict.items()}
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in copied.values())
    present = path.stat().st_size
    if claimed > present:
        raise ValueError(
            f"The tensors of {path.name} must be in the file, but they claim {claimed:,} bytes and it has "
            f"{present:,}: some of them share their data, or repeat it. Save clones of them."
        )
