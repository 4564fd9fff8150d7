"""The masks of the forward call that is running, for blocks whose signatures have no room for a mask.

A model enters the scope for the length of its forward call and its routed blocks look their mask up there, so that
diffusers' own forward methods need no change. The scope belongs to the thread: two threads may call one model. Under
gradient checkpointing a block runs again after its forward call has ended, so what it saw is kept for it, by call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature

import torch
from diffusers import ModelMixin
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..routing import routed_residual
from .routed_model import RoutedModelMixin, timestep_batch


# Bool `(batch, width)` by width, None where nothing is routed.
_Masks = Mapping[int, torch.Tensor | None]


class _Running(threading.local):
    def __init__(self):
        # In every thread from the start: a graph that is compiled in its absence is compiled again in its presence.
        self.masks: _Masks | None = None


_running = _Running()


@contextmanager
def _scope(masks: _Masks | None) -> Iterator[None]:
    outer = _running.masks
    _running.masks = masks
    try:
        yield
    finally:
        _running.masks = outer


def current_mask(width: int, device: torch.device) -> torch.Tensor | None:
    """The mask of the forward call that is running in this thread.

    Args:
        width: Number of channels of the routed block.
        device: Where the block's input is, which is not where the timesteps are in a model spread over devices.

    Returns:
        Bool `(batch, width)`, or None where the model is not routed.

    Raises:
        RuntimeError: Outside a routed model's forward call.
    """
    masks = _running.masks
    if masks is None:
        raise RuntimeError(
            "A routed block ran outside its model's forward call, so it belongs to no timestep. Call the model, not "
            "its blocks; to recompute activations use the model's `enable_gradient_checkpointing`, not a wrapper "
            "around blocks."
        )
    mask = masks[width]
    return None if mask is None else mask.to(device)


def route_tokens(block: Callable[..., torch.Tensor], hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Route a block that turns a stream of tokens into one.

    Args:
        block: Called as `block(masked, *args, **kwargs)`.
        hidden_states: `(batch, tokens, width)`.
        *args: Passed on to `block`.
        **kwargs: Passed on to `block`.

    Returns:
        `(batch, tokens, width)`.
    """
    mask = current_mask(hidden_states.shape[-1], hidden_states.device)
    return routed_residual(block, hidden_states, mask if mask is None else mask[:, None], *args, **kwargs)


def route_image_tokens(
    block: Callable[..., tuple[torch.Tensor | None, torch.Tensor]], hidden_states: torch.Tensor, *args, **kwargs
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Route the image stream of a block that works on text and image together; the text stream is not routed.

    Args:
        block: Called as `block(masked, *args, **kwargs)`; returns (text, image).
        hidden_states: The image stream, `(batch, tokens, width)`.
        *args: Passed on to `block`.
        **kwargs: Passed on to `block`.

    Returns:
        The text stream, or None after a model's last block, and the image stream.
    """
    text = None

    def image_stream(masked, *args, **kwargs):
        nonlocal text
        text, image = block(masked, *args, **kwargs)
        return image

    image = route_tokens(image_stream, hidden_states, *args, **kwargs)
    return text, image


class RoutedCheckpointing:
    """A gradient checkpointing function that runs a block again with the masks of its own forward call.

    Args:
        function: Called as `function(block, *args)`.
    """

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, block: Callable, *args):
        """Run `block(*args)` now, and once more when its gradients are asked for."""
        # A compiled forward call has its recomputation in the same graph, where the masks are ordinary values.
        if not torch.compiler.is_compiling():
            block = partial(_run_in_scope, _running.masks, block)
        return self.function(block, *args)


def _run_in_scope(masks: _Masks, block: Callable, *args):
    with _scope(masks):
        return block(*args)


class ScopedRoutingMixin(RoutedModelMixin):
    """Routes a model through the scope: blocks are routed in place, and the forward method is the base class's."""

    def _plain_config(self) -> dict:
        """The part of the config that the base class's constructor takes."""
        return {name: self.config[name] for name in signature(self.plain_class).parameters}

    @contextmanager
    def _routed(self, timestep: torch.Tensor | float | None, sample: torch.Tensor) -> Iterator[None]:
        """The scope of one forward call."""
        timestep = timestep_batch(timestep, sample)
        with _scope({width: self.routing.mask(timestep, width) for width in self.routed_widths}):
            yield

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable | None = None) -> None:
        """Recompute blocks during backward, with the masks of the forward call that they belong to.

        Args:
            gradient_checkpointing_func: Called as `gradient_checkpointing_func(block, *args)`. Defaults to
                `torch.utils.checkpoint.checkpoint` without reentrant autograd.
        """
        if gradient_checkpointing_func is None:
            gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        super().enable_gradient_checkpointing(RoutedCheckpointing(gradient_checkpointing_func))


class RoutedTransformerMixin(ScopedRoutingMixin):
    """Routes a transformer, whose blocks all have one width.

    Attributes:
        routed_blocks: The routed classes of its blocks, each a direct subclass of the class that it replaces.
    """

    routed_blocks: tuple[type[nn.Module], ...]

    def _route_blocks(self) -> None:
        """Change the classes of blocks and not the instances: state dicts, copies and pickles stay as they are."""
        routed = {block_class.__base__: block_class for block_class in self.routed_blocks}
        for module in self.modules():
            module.__class__ = routed.get(type(module), type(module))

    @classmethod
    def from_transformer(cls, transformer: ModelMixin, **routing) -> ModelMixin:
        """The routed model with the weights of a plain one, which is left as it is.

        Args:
            transformer: A model of the diffusers class that this one routes.
            **routing: Config values that the plain model does not have: `routing_alpha`, `routing_beta`, ...

        Returns:
            A model with copies of the weights, on the same device, of the same dtype and in the same mode.

        Raises:
            TypeError: If `transformer` is of another class, or a name in `routing` is not one of a config value.
        """
        return cls._from_plain(transformer, "transformer", routing)
