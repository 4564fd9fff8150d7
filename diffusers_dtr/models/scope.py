"""The masks of the forward call that is running, for blocks whose signatures have no room for a mask.

A model enters the scope for the length of its forward call and its routed blocks look their mask up there, so that
diffusers' own forward methods need no change. The scope belongs to the thread: two threads may call one model. Under
gradient checkpointing a block runs again after its forward call has ended, so what it saw is kept for it, by call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


# By what is routed (a width of the residual stream), bool `(batch, width)` or `(batch, n, width)`; None where nothing
# is.
Masks = Mapping[Hashable, torch.Tensor | None]


class _Running(threading.local):
    def __init__(self):
        # In every thread from the start: a graph that is compiled in its absence is compiled again in its presence.
        self.masks: Masks | None = None


_running = _Running()


@contextmanager
def scope(masks: Masks | None) -> Iterator[None]:
    """The length of a forward call.

    Args:
        masks: What [`current_mask`] finds in this thread meanwhile.
    """
    outer = _running.masks
    _running.masks = masks
    try:
        yield
    finally:
        _running.masks = outer


def current_mask(key: Hashable) -> torch.Tensor | None:
    """The mask of the forward call that is running in this thread.

    Args:
        key: What is routed: the number of channels of a block's input.

    Returns:
        Bool `(batch, width)`, `(batch, n, width)` where the timesteps are `(batch, n)`, or None where the model is not
        routed.

    Raises:
        RuntimeError: Outside a routed model's forward call, and for a width that the model does not have.
    """
    masks = _running.masks
    if masks is None:
        raise RuntimeError(
            "A routed block ran outside its model's forward call, so it belongs to no timestep. Call the model, not "
            "its blocks; to recompute activations use the model's `enable_gradient_checkpointing`, not a wrapper "
            "around blocks."
        )
    if key not in masks:
        raise RuntimeError(f"A routed block has {key} channels, but its model routes {', '.join(map(str, masks))}.")
    return masks[key]


def token_mask(hidden_states: torch.Tensor | None, batch_dim: int = 0) -> torch.Tensor | None:
    """This call's mask for tokens.

    Args:
        hidden_states: `(batch, ..., width)`. Where the model folds frames or positions into the batch, each sample's
            stand together. With timesteps `(batch, n)`, its tokens are n groups of equal size, in order. None where a
            call has no such stream.
        batch_dim: Axis of the samples.

    Returns:
        Bool, of a shape that broadcasts with `hidden_states`, on its device; or None.

    Raises:
        ValueError: If the timesteps do not divide the tokens.
    """
    if hidden_states is None:
        return None
    mask = current_mask(hidden_states.shape[-1])
    return None if mask is None else _channels_last(mask, hidden_states, batch_dim)


def _channels_second(mask: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    mask = _unfolded(mask.to(hidden_states.device), hidden_states.shape[0])
    return mask.reshape(*mask.shape, *(1,) * (hidden_states.ndim - 2))


def _channels_last(mask: torch.Tensor, hidden_states: torch.Tensor, batch_dim: int = 0) -> torch.Tensor:
    mask = _unfolded(mask.to(hidden_states.device), hidden_states.shape[batch_dim])
    if mask.ndim == 2:
        return mask.reshape([mask.shape[0] if dim == batch_dim else 1 for dim in range(hidden_states.ndim - 1)] + [-1])
    tokens = hidden_states.shape[1:-1].numel()
    if tokens % mask.shape[1]:
        raise ValueError(f"`timestep` must divide the {tokens} tokens of a sample, got {mask.shape[1]} per sample.")
    mask = mask if tokens == mask.shape[1] else mask.repeat_interleave(tokens // mask.shape[1], dim=1)
    return mask.reshape(mask.shape[0], *hidden_states.shape[1:])


def channel_mask(hidden_states: torch.Tensor) -> torch.Tensor | None:
    """This call's mask for images or videos.

    Args:
        hidden_states: `(batch, channels, ...)`. Frames may be folded into the batch, each sample's together.

    Returns:
        Bool, of a shape that broadcasts with `hidden_states`, on its device; or None.
    """
    mask = current_mask(hidden_states.shape[1])
    return None if mask is None else _channels_second(mask, hidden_states)


def rank_mask(output: torch.Tensor, key: Hashable, channel_dim: int = -1) -> torch.Tensor | None:
    """This call's mask for the rank channels of an adapter.

    Args:
        output: Of the adapter's first projection, `(batch, ..., rank)`, or `(batch, rank, ...)` of a convolution.
        key: The adapter's name and rank.
        channel_dim: -1, or 1 for a convolution.

    Returns:
        Bool, of a shape that broadcasts with `output`, on its device; or None.
    """
    mask = current_mask(key)
    if mask is None:
        return None
    if channel_dim == 1:
        return _channels_second(mask, output)
    # Without an axis of tokens, as of embedded timesteps, they are rows as samples are.
    return _channels_last(mask.flatten(0, -2) if output.ndim == 2 else mask, output)


def _unfolded(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """The mask of every row of a batch into which each sample's frames are folded."""
    samples = mask.shape[0]
    if batch % samples:
        raise ValueError(f"A batch of {batch} rows cannot be routed by the timesteps of {samples} samples.")
    return mask if batch == samples or samples == 1 else mask.repeat_interleave(batch // samples, dim=0)


class ScopedCheckpointing:
    """A gradient checkpointing function that runs a block again with the masks of its own forward call.

    Args:
        function: Called as `function(block, *args, **kwargs)`.
    """

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, block: Callable, *args, **kwargs):
        """Run `block(*args, **kwargs)` now, and once more when its gradients are asked for."""
        # A compiled forward call has its recomputation in the same graph, where the masks are ordinary values.
        if not torch.compiler.is_compiling():
            block = partial(_run_in_scope, _running.masks, block)
        return self.function(block, *args, **kwargs)


class ScopedCheckpointingMixin:
    """A model that turns gradient checkpointing on with the masks of each call; to be named before its class."""

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable | None = None) -> None:
        """Recompute blocks during backward, with the masks of the forward call that they belong to.

        Args:
            gradient_checkpointing_func: Called as `gradient_checkpointing_func(block, *args)`. Defaults to
                `torch.utils.checkpoint.checkpoint` without reentrant autograd.
        """
        if gradient_checkpointing_func is None:
            gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        super().enable_gradient_checkpointing(ScopedCheckpointing(gradient_checkpointing_func))


def scope_checkpointing(model: nn.Module) -> None:
    """Give each call's masks to checkpointing that is on already."""
    for module, function in _checkpointing(model):
        if not isinstance(function, ScopedCheckpointing):
            module._gradient_checkpointing_func = ScopedCheckpointing(function)


def unscope_checkpointing(model: nn.Module) -> None:
    """Undo [`scope_checkpointing`]."""
    for module, function in _checkpointing(model):
        if isinstance(function, ScopedCheckpointing):
            module._gradient_checkpointing_func = function.function


def _checkpointing(model: nn.Module) -> list[tuple[nn.Module, Callable]]:
    """Where gradient checkpointing is or was on, and the function for it."""
    functions = ((module, vars(module).get("_gradient_checkpointing_func")) for module in model.modules())
    return [(module, function) for module, function in functions if function is not None]


def _run_in_scope(masks: Masks, block: Callable, *args, **kwargs):
    with scope(masks):
        return block(*args, **kwargs)
