"""The denoising loss: weighted squared error, and the variational bound of a learned variance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import SchedulerMixin
from torch import Tensor, nn

from ..noise_levels import NoiseLevels, sample_dtype
from .weighting import LogitNormal, Weighting, make_weighting


@dataclass(frozen=True)
class DenoisingLossOutput:
    """Loss of a batch, in float32 or wider.

    Attributes:
        loss: Mean of `per_sample`, a scalar.
        per_sample: `(B,)`, `mse` plus `variational_bound`.
        mse: `(B,)`, weighted mean squared error against the target.
        variational_bound: `(B,)` in bits per dimension, not weighted; None if the denoiser predicts no variance.
    """

    loss: Tensor
    per_sample: Tensor
    mse: Tensor
    variational_bound: Tensor | None


class DenoisingLoss:
    """Loss of a denoiser for the schedule, prediction type and process of a diffusers scheduler.

    With as many output channels as the clean samples have, the loss is the weighted mean squared error against the
    scheduler's target. With twice as many, the second half is taken for the variance values of Improved DDPM, and
    their variational bound is added (L_hybrid of Nichol and Dhariwal, arXiv 2102.09672, the bound not rescaled).

    Args:
        noise_scheduler: The scheduler whose `add_noise` or `scale_noise` the training uses.
        weighting: How squared errors are weighted by noise level: a name ("constant", "min_snr", "soft_min_snr",
            "p2", "debiased", "edm", "logit_normal"), an object such as `MinSNR(gamma=5.0)`, or any function of
            `(levels, timesteps)` that returns `(B,)` weights.

    Attributes:
        levels: The [`NoiseLevels`] of the scheduler, for noisy samples and model inputs.
        weighting: The function that weights.

    Raises:
        TypeError: If the scheduler cannot be trained with.
        ValueError: If `weighting` is an unknown name, or not defined for the scheduler.

    Example:
        >>> import torch
        >>> from diffusers import DDPMScheduler
        >>> from diffusers_dtr.objective import DenoisingLoss
        >>> loss_fn = DenoisingLoss(DDPMScheduler(), weighting="min_snr")
        >>> clean, noise, timesteps = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8), torch.tensor([10, 900])
        >>> noisy = loss_fn.levels.add_noise(clean, noise, timesteps)
        >>> model_output = torch.zeros(2, 3, 8, 8)  # of the denoiser, for levels.model_input(noisy, timesteps)
        >>> loss_fn(model_output, clean, noise, timesteps).per_sample
        tensor([0.0110, 1.0000])
    """

    def __init__(self, noise_scheduler: SchedulerMixin, weighting: str | Weighting = "constant"):
        self.levels = NoiseLevels(noise_scheduler)
        self.weighting = make_weighting(weighting)
        if isinstance(self.weighting, LogitNormal):
            self._weights(self.levels.timesteps[:1])  # one that is not for this scheduler shows before training starts

    def __call__(self, model_output: Tensor, clean: Tensor, noise: Tensor, timesteps: Tensor) -> DenoisingLossOutput:
        """Loss of a batch.

        Args:
            model_output: Denoiser output `(B, C, ...)`, or `(B, 2C, ...)` with variance values, in any float dtype.
            clean: Clean samples `(B, C, ...)`.
            noise: The noise that was added to them, in the same shape.
            timesteps: `(B,)`, as the denoiser was called with.

        Raises:
            ValueError: If the shapes do not fit together, or variance values meet a scheduler without betas.
        """
        channels = clean.shape[1] if clean.ndim > 1 else None
        if channels is None or model_output.shape not in (clean.shape, (len(clean), 2 * channels, *clean.shape[2:])):
            raise ValueError(
                "`model_output` must have the shape of `clean`, or that with twice the channels, "
                f"got {tuple(model_output.shape)} and {tuple(clean.shape)}."
            )
        model_output, clean, noise = (sample.to(sample_dtype(sample)) for sample in (model_output, clean, noise))
        squared_error = (model_output[:, :channels] - self.levels.target(clean, noise, timesteps)) ** 2
        mse = squared_error.flatten(1).mean(1)
        mse = self._weights(timesteps).to(mse) * mse
        if model_output.shape == clean.shape:
            return DenoisingLossOutput(mse.mean(), mse, mse, None)
        noisy = self.levels.add_noise(clean, noise, timesteps)
        bound = self.levels.variational_bound(model_output, clean, noisy, timesteps)
        return DenoisingLossOutput((mse + bound).mean(), mse + bound, mse, bound)

    def _weights(self, timesteps: Tensor) -> Tensor:
        weights = self.weighting(self.levels, timesteps)
        if weights.shape != timesteps.shape:
            raise ValueError(
                f"`weighting` must return weights of shape {tuple(timesteps.shape)}, got {tuple(weights.shape)}."
            )
        return weights

    def of_model(
        self,
        model: nn.Module,
        clean: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        conditions: Mapping[str, Any] | None = None,
    ) -> DenoisingLossOutput:
        """Loss of a denoiser on a batch: the samples are noised, scaled, denoised and compared.

        The denoiser is called as `model(model_input, timestep=timesteps, **conditions, return_dict=False)[0]`; the
        other arguments and errors are those of a call of the loss.
        """
        noisy = self.levels.add_noise(clean, noise, timesteps)
        model_input = self.levels.model_input(noisy, timesteps)
        output = model(model_input, timestep=timesteps, **(conditions or {}), return_dict=False)[0]
        return self(output, clean, noise, timesteps)
