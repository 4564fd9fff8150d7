"""Noise levels, noisy samples and targets of a diffusers scheduler.

A forward process is `x_t = α(t)·clean + σ(t)·noise`, and a prediction type is the mixture of clean sample and noise
that the denoiser is asked for, `output = b_clean·clean + b_noise·noise`: the rest follows from these four numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from .forward_processes import prediction_type_of, process_of
from .posterior import Posterior
from .timestep_table import is_discrete, per_sample, sample_dtype


# What diffusers puts in place of √ᾱ = 0 where it has to divide by it (ᾱ = 2⁻²⁴, in its Euler, DPM-Solver and UniPC).
_STAND_IN_FOR_ZERO = 2.0**-12


class NoiseLevels:
    """The noise levels, targets and posterior of a diffusers scheduler, for training.

    Timesteps are what the denoiser is called with, low = nearly clean: integers (or reals between them) in [0, T) for
    schedules made of betas, σ·T in [0, T] for flow matching, ¼·ln σ within the ends of the grid for EDM. They are
    `(B,)` tensors on any device; a ValueError for those outside the schedule is raised on the CPU alone, so that
    nothing here waits for another device. A scalar per timestep is float64 (float32 on devices without float64); a
    sample is computed in at least float32 and returned in the dtype it came in. The sampling state of the scheduler
    (`set_timesteps`, Karras sigmas, `timestep_spacing`) plays no part.

    Args:
        scheduler: A diffusers scheduler with betas (variance preserving, as DDPM, or exploding, as Euler), of EDM, or
            of flow matching. It is read once, and not kept.

    Attributes:
        num_train_timesteps: T, the number of timesteps in the training grid.
        timesteps: float64 `(T,)` on the CPU, the training grid in ascending noise level.
        timestep_range: Smallest and largest timestep of the grid.
        prediction_type: What the denoiser predicts: "epsilon", "sample", "v_prediction" (Salimans and Ho, arXiv
            2202.00512), "flow" (noise − clean), or "edm" (the network F of Karras et al., arXiv 2206.00364, Eq. 7).
        sigma_data: Standard deviation of the clean data that the parametrisation assumes; 1 but for EDM.
        shift: Shift of the training grid of flow matching (SD3, arXiv 2403.03206, Eq. 23); 1 where there is none.

    Raises:
        TypeError: If the scheduler cannot be served; the message names its class and what is missing.

    Example:
        >>> import torch
        >>> from diffusers import DDPMScheduler
        >>> from diffusers_dtr.noise_levels import NoiseLevels
        >>> levels = NoiseLevels(DDPMScheduler())
        >>> levels.timestep_range
        (0.0, 999.0)
        >>> levels.snr(torch.tensor([0, 999])).log10().round().tolist()
        [4.0, -4.0]
    """

    def __init__(self, scheduler: SchedulerMixin):
        self._process = process_of(scheduler)
        self.prediction_type = prediction_type_of(scheduler, self._process)
        self.timesteps = self._process.timesteps
        self.num_train_timesteps = len(self.timesteps)
        self.timestep_range = (self.timesteps[0].item(), self.timesteps[-1].item())
        self.sigma_data, self.shift = self._process.sigma_data, self._process.shift
        self._scheduler_name, self._variance_type = type(scheduler).__name__, scheduler.config.get("variance_type")
        alphas_cumprod = self._process.alphas_cumprod
        self._posterior = None if alphas_cumprod is None else Posterior(alphas_cumprod)

    def as_called(self, timesteps: Tensor) -> Tensor:
        """Timesteps on the CPU in the type that the denoiser is called with in training, validation and analysis.

        int64 on a discrete schedule, if all of them are integers; else float32, as in flow matching and EDM.
        """
        whole = is_discrete(self.timesteps) and torch.equal(timesteps, timesteps.round())
        return timesteps.long() if whole else timesteps.float()

    def alpha(self, timesteps: Tensor) -> Tensor:
        """Share α of the clean sample in the noisy one, `(B,)`, for timesteps `(B,)`."""
        return self._alpha_sigma(timesteps)[0]

    def sigma(self, timesteps: Tensor) -> Tensor:
        """Share σ of the noise in the noisy sample, `(B,)`, for timesteps `(B,)`."""
        return self._alpha_sigma(timesteps)[1]

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio α²/σ², `(B,)` in [0, ∞], for timesteps `(B,)`."""
        alpha, sigma = self._alpha_sigma(timesteps)
        return (alpha / sigma) ** 2

    def log_snr(self, timesteps: Tensor) -> Tensor:
        """Natural logarithm of the signal-to-noise ratio, `(B,)` in [−∞, ∞], for timesteps `(B,)`."""
        alpha, sigma = self._alpha_sigma(timesteps)
        return 2 * (alpha.log() - sigma.log())

    def clean_gain(self, timesteps: Tensor) -> Tensor:
        """Squared error of the predicted clean sample per squared error of the output, `(B,)`: 1/SNR for epsilon."""
        return self._gains(timesteps)[0]

    def noise_gain(self, timesteps: Tensor) -> Tensor:
        """Squared error of the predicted noise per squared error of the output, `(B,)`; SNR times `clean_gain`."""
        return self._gains(timesteps)[1]

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy samples α·clean + σ·noise, in the shape and dtype of `clean`.

        Args:
            clean: Clean samples `(B, ...)`.
            noise: Standard normal noise of the same shape.
            timesteps: `(B,)`.

        Raises:
            ValueError: If the shapes differ, or a timestep (on the CPU) lies outside the schedule.
        """
        _check_batch(timesteps, clean=clean, noise=noise)
        alpha, sigma = self._alpha_sigma(timesteps)
        return _mix(alpha, clean, sigma, noise)

    def model_input(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Input of the denoiser: noisy samples `(B, ...)`, scaled to unit variance in variance exploding processes."""
        _check_batch(timesteps, noisy=noisy)
        if not self._process.scales_input:
            self._process.check_range(timesteps)
            return noisy
        alpha, sigma = self._alpha_sigma(timesteps)
        deviation = torch.hypot(alpha * self.sigma_data, sigma)
        return (noisy / per_sample(deviation, noisy)).to(noisy.dtype)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Training target of the denoiser; arguments, result and errors as in `add_noise`."""
        _check_batch(timesteps, clean=clean, noise=noise)
        clean_share, noise_share = self._target_shares(timesteps)
        return _mix(clean_share, clean, noise_share, noise)

    def predict_clean(self, model_output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Predicted clean samples, in the shape and dtype of `noisy`: `target` and `add_noise` solved for them.

        At SNR 0 predicted noise determines no clean sample: α is then taken for 2⁻¹², as diffusers does (ᾱ = 2⁻²⁴).
        The denoiser's output `(B, ...)` is without variance channels; errors are those of `add_noise`.
        """
        _check_batch(timesteps, noisy=noisy, model_output=model_output)
        _, noise_share = self._target_shares(timesteps)
        _, sigma, determinant = self._solvable(timesteps)
        return _mix(noise_share / determinant, noisy, -sigma / determinant, model_output)

    def variational_bound(self, model_output: Tensor, clean: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Term of the variational bound that trains a learned-range variance, with the predicted mean frozen.

        KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)) for t > 0 and the discretised decoder's −log p(x_0 | x_1) at
        t = 0, not rescaled by T (Nichol and Dhariwal, arXiv 2102.09672, Eq. 4 to 6 and 15, and their L_hybrid). No
        gradient reaches the mean. The decoder assumes clean samples made of 256 levels in [−1, 1].

        Args:
            model_output: Prediction and variance values `(B, 2C, ...)`.
            clean: Clean samples `(B, C, ...)`.
            noisy: Noisy samples `(B, C, ...)`.
            timesteps: `(B,)`.

        Returns:
            Bits per dimension `(B,)`, in float32 or wider.

        Raises:
            ValueError: If the shapes do not fit, or the scheduler has no betas, hence no posterior, or takes the
                variance in another form than "learned_range".
        """
        if self._posterior is None:
            raise ValueError(
                f"`model_output` has variance channels, but {self._scheduler_name} has no betas to bound them with: "
                "use a scheduler such as DDPMScheduler, or pass the prediction's channels only."
            )
        if self._variance_type == "learned":
            raise ValueError(
                '`scheduler` must read variance values as a range (`variance_type="learned_range"`), '
                'got `variance_type="learned"`.'
            )
        if clean.ndim < 2 or model_output.shape != (len(clean), 2 * clean.shape[1], *clean.shape[2:]):
            raise ValueError(
                "`model_output` must have twice the channels of `clean`, "
                f"got {tuple(model_output.shape)} and {tuple(clean.shape)}."
            )
        prediction, variance_values = (part.to(sample_dtype(part)) for part in model_output.chunk(2, dim=1))
        predicted_clean = self.predict_clean(prediction.detach(), noisy.to(sample_dtype(noisy)), timesteps)
        return self._posterior.bound(predicted_clean, variance_values, clean.to(sample_dtype(clean)), timesteps)

    def _alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        _check_timesteps(timesteps)
        self._process.check_range(timesteps)
        return self._process.alpha_sigma(timesteps)

    def _target_shares(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return _TARGET_SHARES[self.prediction_type](*self._alpha_sigma(timesteps), self.sigma_data)

    def _solvable(self, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """α, σ and the determinant of (clean, noise) → (noisy, output), with stand-ins where it is 0."""
        alpha, sigma = self._alpha_sigma(timesteps)
        singular = self._determinant(alpha, sigma) == 0
        alpha, sigma = (torch.where(singular, part.clamp(min=_STAND_IN_FOR_ZERO), part) for part in (alpha, sigma))
        return alpha, sigma, self._determinant(alpha, sigma)

    def _determinant(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        clean_share, noise_share = _TARGET_SHARES[self.prediction_type](alpha, sigma, self.sigma_data)
        return alpha * noise_share - sigma * clean_share

    def _gains(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma, determinant = self._solvable(timesteps)
        return (sigma / determinant) ** 2, (alpha / determinant) ** 2


def _velocity_shares(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Velocity α·noise − σ·clean of the process in which both the data and the noisy samples have unit variance."""
    deviation = torch.hypot(alpha * sigma_data, sigma)
    return -sigma / (sigma_data * deviation), alpha * sigma_data / deviation


def _edm_shares(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """EDM, Eq. 7, solved for the network F: its c_out is positive, which makes F the negative velocity."""
    clean_share, noise_share = _velocity_shares(alpha, sigma, sigma_data)
    return -clean_share, -noise_share


# prediction type -> (b_clean, b_noise) as functions of (α, σ, σ_data)
_TARGET_SHARES: Mapping[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "epsilon": lambda alpha, sigma, sigma_data: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "sample": lambda alpha, sigma, sigma_data: (torch.ones_like(alpha), torch.zeros_like(alpha)),
    "v_prediction": _velocity_shares,
    "edm": _edm_shares,
    "flow": lambda alpha, sigma, sigma_data: (-torch.ones_like(alpha), torch.ones_like(alpha)),
}


def _check_timesteps(timesteps: Tensor) -> None:
    if not isinstance(timesteps, Tensor) or timesteps.ndim != 1:
        found = f"shape {tuple(timesteps.shape)}" if isinstance(timesteps, Tensor) else type(timesteps).__name__
        raise ValueError(f"`timesteps` must be a tensor of shape (batch,), got {found}.")


def _check_batch(timesteps: Tensor, **samples: Tensor) -> None:
    _check_timesteps(timesteps)
    (name, first), *others = samples.items()
    for other_name, other in others:
        if other.shape != first.shape:
            raise ValueError(
                f"`{other_name}` must have the shape of `{name}`, {tuple(first.shape)}, got {tuple(other.shape)}."
            )
    if timesteps.shape != first.shape[:1]:
        raise ValueError(
            f"`timesteps` must have one value per sample of `{name}`, whose shape is {tuple(first.shape)}, "
            f"got {len(timesteps)} timesteps."
        )


def _mix(scale: Tensor, sample: Tensor, other_scale: Tensor, other: Tensor) -> Tensor:
    """scale·sample + other_scale·other, one scale per sample, in the dtype of `sample`."""
    return (per_sample(scale, sample) * sample + per_sample(other_scale, sample) * other).to(sample.dtype)
