"""The noise of a training step, with the two changes to it that diffusers' example scripts offer."""

from __future__ import annotations

import torch


def draw_noise(
    shape: torch.Size, generator: torch.Generator, noise_offset: float = 0.0, input_perturbation: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise to learn, and noise to add.

    Without offset and perturbation, both are the same standard normal numbers.

    Args:
        shape: `(B, C, ...)`.
        generator: Draws the noise, on its device.
        noise_offset: Scale of normal numbers, one per sample and channel, that are added to the noise, so that a model
            learns to change the mean of a channel (crosslabs.org/blog/diffusion-with-offset-noise).
        input_perturbation: Scale of normal numbers that the denoiser's input has in addition and its target has not
            (arXiv 2301.11706).

    Returns:
        What the loss takes as the noise, and what clean samples are mixed with, both of `shape`.
    """

    def draw(size: torch.Size) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=generator.device)

    noise = draw(shape)
    if noise_offset:
        noise = noise + noise_offset * draw((*shape[:2], *(1 for _ in shape[2:])))
    added = noise + input_perturbation * draw(shape) if input_perturbation else noise
    return noise, added
