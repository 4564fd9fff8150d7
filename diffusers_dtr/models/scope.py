"""The masks of the forward call that is running, for blocks whose signatures have no room for a mask.

The scope belongs to the thread: two threads may call one model. Under gradient checkpointing a block runs again after
its forward call has ended, so what it saw is kept for it, by call.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..run_record import LORA_FILE


# By what is routed, bool `(batch, width)` or `(batch, n, width)`; None where nothing is.
Masks = Mapping[Hashable, torch.Tensor | None]


class _Running(threading.local):
    def __init__(self):
        # In every thread from the start: a graph that is compiled in its absence is compiled again in its presence.
        self.masks: Masks | None = None


_running = _Running()


@contextmanager
def scope(masks: Masks | None) -> Iterator[None]:
    """The length of a forward call, in which [`token_mask`] finds these masks in this thread."""
    outer = _running.masks
    _running.masks = masks
    try:
        yield
    finally:
        _running.masks = outer


def token_mask(
    hidden_states: torch.Tensor | None, batch_dim: int = 0, channel_dim: int = -1, key: Hashable | None = None
) -> torch.Tensor | None:
    """A bool mask that broadcasts with a stream, of the forward call that is running in this thread, if it is routed.

    Where the model folds frames or positions into the batch, each sample's stand together. With timesteps `(batch, n)`
    tokens are n groups of equal size, in order. `key` is what is routed, by default the width of the stream.
    """
    if hidden_states is None:
        return None
    masks = _running.masks
    if masks is None:
        raise RuntimeError(
            "A routed block ran outside its model's forward call. Call the model, not its blocks; to recompute "
            "activations use the model's `enable_gradient_checkpointing`, not a wrapper around blocks."
        )
    key = hidden_states.shape[channel_dim] if key is None else key
    if key not in masks:
        raise RuntimeError(f"A routed block has {key} channels, but its model routes {', '.join(map(str, masks))}.")
    if masks[key] is None:
        return None
    mask, moved = masks[key].to(hidden_states.device), (batch_dim, channel_dim)
    return _spread(mask, hidden_states.movedim(moved, (0, -1)).shape).movedim((0, -1), moved)


def _spread(mask: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A mask in a shape that broadcasts with `(batch, ..., width)`, where the batch may have tokens folded into it."""
    samples, rows = mask.shape[0], shape[0]
    if rows % samples:
        raise ValueError(f"A batch of {rows} rows cannot be routed by the timesteps of {samples} samples.")
    if mask.ndim == 2:
        mask = mask if samples in (1, rows) else mask.repeat_interleave(rows // samples, dim=0)
        return mask.reshape(mask.shape[0], *(1,) * (len(shape) - 2), -1)
    tokens = shape[:-1].numel() // samples
    if tokens % mask.shape[1]:
        raise ValueError(f"`timestep` must divide the {tokens} tokens of a sample, got {mask.shape[1]} per sample.")
    mask = mask if tokens == mask.shape[1] else mask.repeat_interleave(tokens // mask.shape[1], dim=1)
    return mask.reshape(shape)


class ScopedCheckpointing:
    """A gradient checkpointing function `function(block, ...)` that runs a block again with its own call's masks."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, block: Callable, *args, **kwargs):
        """Run a block now, and once more when its gradients are asked for."""
        # A compiled forward call has its recomputation in the same graph, where the masks are ordinary values.
        if not torch.compiler.is_compiling():
            block = partial(_run_in_scope, _running.masks, block)
        return self.function(block, *args, **kwargs)


class ScopedMixin:
    """A model within whose forward calls there are masks; to be named before its class."""

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable | None = None) -> None:
        """Recompute blocks during backward, with the masks of the forward call that they belong to."""
        super().enable_gradient_checkpointing(gradient_checkpointing_func or partial(checkpoint, use_reentrant=False))
        scope_checkpointing(self)

    def save_lora_adapter(
        self,
        save_directory: str | os.PathLike,
        adapter_name: str = "default",
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
        weight_name: str | None = None,
    ) -> None:
        """Save a LoRA adapter as diffusers does; the file of a routed one says so, and cannot be a pickle."""
        from .adapters import adapter_routing  # these are made of this module
        from .lora_header import mark_routed

        routing = adapter_routing(self, adapter_name)
        if routing is not None and not safe_serialization:
            raise ValueError("`safe_serialization` must be True for a routed adapter, whose routing is in the header.")
        options = (adapter_name, upcast_before_saving, safe_serialization, weight_name)
        super().save_lora_adapter(save_directory, *options)
        if routing is not None:
            mark_routed(Path(save_directory, weight_name or LORA_FILE), {"": routing})

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA adapter as diffusers does, but never swap a routed one, which would lose its routing."""
        routed = vars(self).get("routed_adapters", {})
        is_swapped = hotswap and kwargs.get("adapter_name") in routed
        if routed and (is_swapped or self._prepare_lora_hotswap_kwargs is not None):
            raise ValueError(
                f"Adapters that are routed ({', '.join(routed)}) cannot be hot-swapped: `unroute_adapter` them first, "
                "or load another under a name of its own, with `load_routed_lora` and without `enable_lora_hotswap`."
            )
        super().load_lora_adapter(pretrained_model_name_or_path_or_dict, prefix, hotswap, **kwargs)


def scope_checkpointing(model: nn.Module, is_scoped: bool = True) -> None:
    """Give each call's masks to checkpointing that is on already, or undo that."""
    for module in model.modules():
        function = vars(module).get("_gradient_checkpointing_func")
        if function is not None and isinstance(function, ScopedCheckpointing) != is_scoped:
            module._gradient_checkpointing_func = ScopedCheckpointing(function) if is_scoped else function.function


def _run_in_scope(masks: Masks, block: Callable, *args, **kwargs):
    with scope(masks):
        return block(*args, **kwargs)
