"""Gradients of the denoising loss at single timesteps, all over the same images and noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device, slice_tensors
from torch import Tensor, nn

from ..objective.denoising_loss import DenoisingLoss
from ..ranges import COUNT


# Two halves of the images for the reliability of a result, and two parts of each half for inner products of
# gradients that have no image in common.
NUM_PARTS = 4


def named_tensors(conditions: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """All tensors by name, which is `mapping.name` for one in a mapping."""
    tensors: dict[str, Tensor] = {}
    for name, value in conditions.items():
        nested = isinstance(value, Mapping)
        tensors |= named_tensors(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return tensors


def checked_conditions(conditions: Mapping[str, Any] | None, num_images: int) -> dict[str, Any]:
    """What else a denoiser is called with: tensors `(num_images, ...)` by argument name, or mappings of these."""
    for name, values in named_tensors(conditions or {}).items():
        if len(values) != num_images:
            raise ValueError(
                f"`conditions` must have one entry for each of the {num_images} clean samples, got {len(values)} of "
                f"{name!r}."
            )
    return dict(conditions or {})


def checked_samples(
    clean: Tensor, noise: Tensor, conditions: Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The clean samples, noise and conditions that all gradients are taken over, in four equal parts."""
    if len(clean) == 0 or len(clean) % NUM_PARTS:
        raise ValueError(
            f"`clean` must have a multiple of {NUM_PARTS} images, which are compared in {NUM_PARTS} parts, got "
            f"{len(clean)}."
        )
    if noise.shape != clean.shape:
        raise ValueError(f"`noise` must have the shape of `clean`, {tuple(clean.shape)}, got {tuple(noise.shape)}.")
    return clean, noise, checked_conditions(conditions, len(clean))


class TimestepGradients:
    """The gradient of a model's denoising loss at any timestep, averaged over one part of the images.

    Part p has the images p, p + 4, p + 8, ..., so that images sorted by class spread over the parts. The model's mode
    is left as it is: gradients of one that drops labels or features at random are not comparable.

    Args:
        model: The denoiser, called as by [`DenoisingLoss.of_model`].
        loss_fn: The loss.
        samples: Of [`checked_samples`]; they are moved to the model's device.
        parameters: Which parameters take part, by name; all by default. Those with `requires_grad=False` never do.
        batch_size: Images per forward call; all of a part by default.

    Raises:
        ValueError: If no parameter takes part, or `batch_size` is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: DenoisingLoss,
        samples: tuple[Tensor, Tensor, dict[str, Any]],
        *,
        parameters: Callable[[str], bool] | None = None,
        batch_size: int | None = None,
    ):
        if batch_size is not None:
            COUNT.check(batch_size=batch_size)
        trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.parameters = {name: value for name, value in trainable.items() if parameters is None or parameters(name)}
        if not self.parameters:
            raise ValueError(
                "`parameters` must leave at least one parameter that requires a gradient, got none of the "
                f"{len(trainable)} trainable ones of {type(model).__name__}."
            )
        self.model = model
        self.loss_fn = loss_fn
        self.samples = send_to_device(samples, next(iter(self.parameters.values())).device)
        self.batch_size = batch_size

    @torch.enable_grad()
    def __call__(self, timestep: Tensor, part: int, names: Iterable[str]) -> dict[str, Tensor]:
        """The gradient with respect to the parameters of these names; zero where the output does not depend on one.

        Args:
            timestep: A scalar, of the type that the denoiser is called with.
            part: Which part of the images, in [0, 4).
            names: Names of parameters.
        """
        parameters = {name: self.parameters[name] for name in names}
        sums: dict[str, Tensor] = {}
        num_images = len(self.samples[0])
        stride = num_images if self.batch_size is None else self.batch_size * NUM_PARTS
        for start in range(part, num_images, stride):
            clean, noise, conditions = slice_tensors(self.samples, slice(start, start + stride, NUM_PARTS))
            timesteps = timestep.to(clean.device).expand(len(clean))
            losses = self.loss_fn.of_model(self.model, clean, noise, timesteps, conditions).per_sample
            loss = losses.sum() / (num_images // NUM_PARTS)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                # Not in place: autograd may return one tensor for two parameters.
                sums[name] = sums[name] + gradient if name in sums else gradient
        return sums
