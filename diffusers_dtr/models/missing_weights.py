"""Weights that a saved model should have and has not: diffusers leaves such parameters without data, and warns."""

from __future__ import annotations

from itertools import chain

from torch import nn


def check_no_weights_missing(model: nn.Module) -> None:
    """Refuse a model that was loaded from a checkpoint without all of its weights.

    Args:
        model: As loaded. One that is spread over devices keeps some of its weights elsewhere, and is not looked at.

    Raises:
        ValueError: If parameters or buffers have no data; it names the first of them.
    """
    if hasattr(model, "hf_device_map"):
        return
    tensors = chain(model.named_parameters(), model.named_buffers())
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise ValueError(
            f"The weights of a {type(model).__name__} must have what its config tells of, but {missing[0]} is missing"
            + (f", and {len(missing) - 1} more." if len(missing) > 1 else ".")
        )
