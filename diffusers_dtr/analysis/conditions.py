"""Conditioning of a denoiser: tensors by argument name, some of them in mappings.

A class-conditional model takes `{"class_labels": labels}`, PixArt `{"encoder_hidden_states": texts,
"added_cond_kwargs": {"resolution": sizes, "aspect_ratio": ratios}}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def checked_conditions(conditions: Mapping[str, Any] | None, num_images: int) -> dict[str, Any]:
    """Copy tensors `(num_images, ...)` by name, or mappings of these; a ValueError for one of another length."""
    for name, values in named_tensors(conditions or {}).items():
        if len(values) != num_images:
            raise ValueError(
                f"`conditions` must have one entry for each of the {num_images} clean samples, got {len(values)} of "
                f"{name!r}."
            )
    return dict(conditions or {})


def named_tensors(conditions: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """All tensors by name, which is `mapping.name` for one in a mapping."""
    tensors: dict[str, Tensor] = {}
    for name, value in conditions.items():
        nested = isinstance(value, Mapping)
        tensors |= named_tensors(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return tensors
