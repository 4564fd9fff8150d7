"""Noise levels: the forward process a diffusers scheduler trains with. The only file that knows scheduler classes.

A forward process is `x_t = α(t)·clean + σ(t)·noise`, and a prediction type is the mixture of clean sample and noise
that the denoiser is asked for, `output = b_clean·clean + b_noise·noise`: the rest follows from these four numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler, SchedulerMixin, UnCLIPScheduler
from torch import Tensor


# The variance types with which a scheduler's `step` samples from the predicted variance. DPM-Solver and SASolver also
# take `variance_type`, but only to throw those channels away.
_LEARNED_VARIANCE_TYPES: Mapping[type, tuple[str, ...]] = {
    DDPMScheduler: ("learned", "learned_range"),
    DDPMParallelScheduler: ("learned", "learned_range"),
    UnCLIPScheduler: ("learned_range",),
}

# What diffusers puts in place of √ᾱ = 0 where it has to divide by it (ᾱ = 2⁻²⁴, in its Euler, DPM-Solver and UniPC).
_STAND_IN_FOR_ZERO = 2.0**-12


def uses_learned_variance(scheduler: SchedulerMixin) -> bool:
    """Whether `scheduler.step` samples with a variance that the denoiser predicts.

    Args:
        scheduler: Any diffusers scheduler.

    Returns:
        True for DDPM, DDPMParallel and UnCLIP with a learned `variance_type`; False for every other scheduler: they
        need a denoiser output without variance channels, or discard them.
    """
    return any(
        isinstance(scheduler, cls) and scheduler.config.variance_type in variance_types
        for cls, variance_types in _LEARNED_VARIANCE_TYPES.items()
    )


class NoiseLevels:
    """The noise levels, targets and posterior of a diffusers scheduler, for training.

    Timesteps are what the denoiser is called with, low = nearly clean: integers (or reals between them) in [0, T) for
    schedules made of betas, σ·T for flow matching, ¼·ln σ for EDM. They are `(B,)` tensors on any device; reading the
    tables never waits for it. A scalar per timestep is float64 (float32 on devices without float64); a sample is
    computed in at least float32 and returned in the dtype it came in.

    The sampling state of the scheduler (`set_timesteps`, Karras sigmas, `timestep_spacing`) plays no part: these are
    the levels of its training.

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
        self._process = _process_of(scheduler)
        self.prediction_type = _prediction_type_of(scheduler, self._process)
        self.timesteps = self._process.timesteps
        self.num_train_timesteps = len(self.timesteps)
        self.timestep_range = (self.timesteps[0].item(), self.timesteps[-1].item())
        self.sigma_data = self._process.sigma_data
        self._scheduler_name = type(scheduler).__name__
        self._variance_type = scheduler.config.get("variance_type")
        alphas_cumprod = self._process.alphas_cumprod
        self._posterior = None if alphas_cumprod is None else _Posterior(alphas_cumprod)

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
        """Noisy sample α·clean + σ·noise.

        Args:
            clean: Clean samples `(B, ...)`.
            noise: Standard normal noise of the same shape.
            timesteps: `(B,)`.

        Returns:
            Noisy samples in the shape and dtype of `clean`.

        Raises:
            ValueError: If the shapes differ, or a timestep (on the CPU) lies outside the schedule.
        """
        _check_batch(timesteps, clean=clean, noise=noise)
        alpha, sigma = self._alpha_sigma(timesteps)
        return _mix(alpha, clean, sigma, noise)

    def model_input(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser is fed: noisy samples `(B, ...)`, scaled to unit variance in variance exploding processes.

        Raises:
            ValueError: As `add_noise`.
        """
        _check_batch(timesteps, noisy=noisy)
        if not self._process.scales_input:
            return noisy
        alpha, sigma = self._alpha_sigma(timesteps)
        deviation = torch.hypot(alpha * self.sigma_data, sigma)
        return (noisy / _per_sample(deviation, noisy)).to(noisy.dtype)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should return for these samples; arguments, result and errors as in `add_noise`."""
        _check_batch(timesteps, clean=clean, noise=noise)
        clean_share, noise_share = self._target_shares(timesteps)
        return _mix(clean_share, clean, noise_share, noise)

    def predict_clean(self, model_output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Clean sample that a prediction amounts to: `target` and `add_noise` solved for it.

        At SNR 0 predicted noise determines no clean sample: α is then taken for 2⁻¹², as diffusers does (ᾱ = 2⁻²⁴).

        Args:
            model_output: Denoiser output `(B, ...)`, without variance channels.
            noisy: Noisy samples of the same shape, as `add_noise` returns them.
            timesteps: `(B,)`.

        Returns:
            Predicted clean samples in the shape and dtype of `noisy`.

        Raises:
            ValueError: As `add_noise`.
        """
        _check_batch(timesteps, noisy=noisy, model_output=model_output)
        _, noise_share = self._target_shares(timesteps)
        _, sigma, determinant = self._solvable(timesteps)
        return _mix(noise_share / determinant, noisy, -sigma / determinant, model_output)

    def variational_bound(self, model_output: Tensor, clean: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Term of the variational bound that trains a learned-range variance, the predicted mean being frozen.

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
        prediction, variance_values = (part.to(_wide(part)) for part in model_output.chunk(2, dim=1))
        predicted_clean = self.predict_clean(prediction.detach(), noisy.to(_wide(noisy)), timesteps)
        return self._posterior.bound(predicted_clean, variance_values, clean.to(_wide(clean)), timesteps)

    def _alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        _check_timesteps(timesteps)
        return self._process.alpha_sigma(timesteps)

    def _target_shares(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return _TARGET_SHARES[self.prediction_type](*self._alpha_sigma(timesteps), self.sigma_data)

    def _solvable(self, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """α, σ and the determinant of (clean, noise) → (noisy, output), with stand-ins where it is 0."""

        def with_determinant(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            clean_share, noise_share = _TARGET_SHARES[self.prediction_type](alpha, sigma, self.sigma_data)
            return alpha, sigma, alpha * noise_share - sigma * clean_share

        alpha, sigma = self._alpha_sigma(timesteps)
        exact = with_determinant(alpha, sigma)
        regular = with_determinant(alpha.clamp(min=_STAND_IN_FOR_ZERO), sigma.clamp(min=_STAND_IN_FOR_ZERO))
        singular = exact[2] == 0
        return tuple(torch.where(singular, *values) for values in zip(regular, exact, strict=True))

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


class _Table:
    """Float64 values at the timesteps 0 to T − 1, interpolated between them, copied to each device once."""

    def __init__(self, values: Tensor):
        self._values = values.to("cpu", torch.float64)
        self._copies: dict[torch.device, Tensor] = {}

    def __call__(self, timesteps: Tensor) -> Tensor:
        if timesteps.device not in self._copies:
            self._copies[timesteps.device] = self._values.to(timesteps.device, _scalar_dtype(timesteps))
        values = self._copies[timesteps.device]
        lower = timesteps.floor().long()
        try:
            below, above = values.index_select(0, lower), values.index_select(0, timesteps.ceil().long())
        except IndexError as error:  # a GPU reports the same as a device-side assertion: checking would wait for it
            raise ValueError(
                f"`timesteps` must lie in [0, {len(values) - 1}], got {timesteps.min()} to {timesteps.max()}."
            ) from error
        return torch.lerp(below, above, (timesteps - lower).to(values.dtype))


class _Process:
    """A forward process: its training grid, and α and σ at any timestep."""

    scales_input: ClassVar[bool] = False
    # The scheduler's `config.prediction_type` -> our name, for the types that are defined in this process.
    prediction_types: ClassVar[Mapping[str, str]] = {name: name for name in ("epsilon", "sample", "v_prediction")}

    def __init__(self, timesteps: Tensor, sigma_data: float = 1.0, alphas_cumprod: Tensor | None = None):
        self.timesteps = timesteps
        self.sigma_data = sigma_data
        self.alphas_cumprod = alphas_cumprod

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class _VariancePreserving(_Process):
    """DDPM and its solvers: α² = ᾱ, σ² = 1 − ᾱ."""

    def __init__(self, alphas_cumprod: Tensor):
        super().__init__(torch.arange(len(alphas_cumprod), dtype=torch.float64), alphas_cumprod=alphas_cumprod)
        self._table = _Table(alphas_cumprod)

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alphas_cumprod = self._table(timesteps)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


class _VarianceExploding(_Process):
    """The k-diffusion style schedulers (Euler, Heun, KDPM2, LMS): α = 1, σ² = (1 − ᾱ)/ᾱ."""

    scales_input = True

    def __init__(self, alphas_cumprod: Tensor):
        super().__init__(torch.arange(len(alphas_cumprod), dtype=torch.float64), alphas_cumprod=alphas_cumprod)
        # Between two timesteps these schedulers interpolate σ itself.
        self._table = _Table(((1 - alphas_cumprod) / alphas_cumprod).sqrt())

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self._table(timesteps)
        return torch.ones_like(sigma), sigma


class _LogSigmaTime(_Process):
    """Variance exploding with the timestep ¼·ln σ: Euler with continuous timesteps."""

    scales_input = True

    def __init__(self, sigmas: Tensor, sigma_data: float = 1.0):
        super().__init__(sigmas.log() / 4, sigma_data)

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigma = (4 * timesteps.to(_scalar_dtype(timesteps))).exp()
        return torch.ones_like(sigma), sigma


class _EDM(_LogSigmaTime):
    """EDM (Karras et al., arXiv 2206.00364): as above, with data of standard deviation σ_data."""

    prediction_types: ClassVar[Mapping[str, str]] = {"epsilon": "edm", "v_prediction": "v_prediction"}


class _Flow(_Process):
    """Rectified flow: α = 1 − σ, and σ·T is the timestep, whatever the shift."""

    prediction_types: ClassVar[Mapping[str, str]] = {
        "flow_prediction": "flow",
        "epsilon": "epsilon",
        "sample": "sample",
    }

    def __init__(self, num_train_timesteps: int, shift: float):
        sigmas = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        super().__init__(shift * sigmas / (1 + (shift - 1) * sigmas) * num_train_timesteps)

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigma = timesteps.to(_scalar_dtype(timesteps)) / len(self.timesteps)
        return 1 - sigma, sigma


class _Posterior:
    """q(x_{t−1} | x_t, x_0) of a schedule made of betas (Ho et al., arXiv 2006.11239, Eq. 6 and 7)."""

    def __init__(self, alphas_cumprod: Tensor):
        previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        betas = 1 - alphas_cumprod / previous
        variance = betas * (1 - previous) / (1 - alphas_cumprod)
        # At t = 0 the posterior is a point: the decoder takes its place, with the variance of t = 1.
        variance[0] = variance[1] if len(variance) > 1 else betas[0]
        self._clean_share = _Table(betas * previous.sqrt() / (1 - alphas_cumprod))
        self._log_variance = _Table(variance.log())
        self._log_beta = _Table(betas.log())

    def bound(self, predicted_clean: Tensor, variance_values: Tensor, clean: Tensor, timesteps: Tensor) -> Tensor:
        """Bits per dimension `(B,)`. x_t enters both means alike, so only the clean samples are compared."""
        clean_share, true_log_variance, log_beta = (
            _per_sample(table(timesteps), clean) for table in (self._clean_share, self._log_variance, self._log_beta)
        )
        # Nichol and Dhariwal, Eq. 15, with values in [−1, 1] instead of [0, 1].
        log_variance = torch.lerp(true_log_variance, log_beta, (variance_values + 1) / 2)
        mean_difference = clean_share * (clean - predicted_clean)
        log_ratio = true_log_variance - log_variance
        divergence = 0.5 * (log_ratio.exp() - 1 - log_ratio + mean_difference**2 * (-log_variance).exp())
        # At t = 0 the share of x_t in the mean is 0 and that of the clean sample is 1.
        decoder = -_discretized_gaussian_log_likelihood(clean, predicted_clean, 0.5 * log_variance)
        at_start = _per_sample(timesteps, clean) == 0
        return torch.where(at_start, decoder, divergence).flatten(1).mean(1) / math.log(2)


def _discretized_gaussian_log_likelihood(clean: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Log probability of 256 levels in [−1, 1] under a Gaussian, the outer bins being open (DDPM, Eq. 13)."""
    half_bin = 1 / 255
    upper = _normal_cdf((clean + half_bin - mean) * (-log_deviation).exp())
    lower = _normal_cdf((clean - half_bin - mean) * (-log_deviation).exp())
    upper = torch.where(clean > 0.999, 1.0, upper)
    lower = torch.where(clean < -0.999, 0.0, lower)
    return (upper - lower).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Page's tanh approximation, not the error function: published bounds are measured with it."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _process_of(scheduler: SchedulerMixin) -> _Process:
    if not hasattr(scheduler, "config"):
        raise TypeError(f"`scheduler` must be a diffusers scheduler, got {type(scheduler).__name__}.")
    config = scheduler.config
    if not hasattr(scheduler, "add_noise") and not hasattr(scheduler, "scale_noise"):
        raise _unserved(scheduler, "an `add_noise` or `scale_noise` method: it only samples")
    if config.get("use_flow_sigmas"):
        return _flow_of(scheduler, shift_key="flow_shift")
    if hasattr(scheduler, "scale_noise"):
        return _flow_of(scheduler, shift_key="shift")
    if hasattr(scheduler, "precondition_outputs"):
        return _edm_of(scheduler)
    if not hasattr(scheduler, "betas") or not hasattr(scheduler, "alphas_cumprod"):
        raise _unserved(scheduler, "`betas` and `alphas_cumprod`, EDM preconditioning or flow matching")
    alphas_cumprod = _alphas_cumprod_of(scheduler)
    # Sampling starts from noise of this deviation: unit in a variance preserving process, σ_max in an exploding one.
    if float(scheduler.init_noise_sigma) == 1.0:
        return _VariancePreserving(alphas_cumprod)
    if config.get("timestep_type") == "continuous" and config.prediction_type == "v_prediction":
        return _LogSigmaTime(((1 - alphas_cumprod) / alphas_cumprod).sqrt())
    return _VarianceExploding(alphas_cumprod)


def _alphas_cumprod_of(scheduler: SchedulerMixin) -> Tensor:
    """ᾱ in float64 `(T,)`."""
    betas = scheduler.betas.to("cpu", torch.float64)
    # The largest beta that diffusers makes of a cosine schedule: of 1 − β, its float32 leaves five digits.
    betas = torch.where(betas == float(torch.tensor(0.999)), 0.999, betas)
    # 1 − ᾱ of a float32 ᾱ near 1 has three or four digits left (ᾱ = 0.9999 at t = 0): the betas have them all.
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    # Where a scheduler's ᾱ is not its betas' product up to rounding, it was set on purpose and counts: the floor of
    # 2⁻²⁴ at zero terminal SNR, the SNR shift of CogVideoX. The SNR shows a difference near ᾱ = 0 and near ᾱ = 1.
    own = scheduler.alphas_cumprod.to("cpu", torch.float64)
    same = torch.isclose(alphas_cumprod / (1 - alphas_cumprod), own / (1 - own), rtol=5e-3, atol=0)
    return torch.where(same, alphas_cumprod, own)


def _edm_of(scheduler: SchedulerMixin) -> _Process:
    config = scheduler.config
    if not math.isclose(float(scheduler.precondition_noise(torch.tensor(math.e**4))), 1.0, rel_tol=1e-5):
        raise _unserved(scheduler, "timesteps of ¼·ln σ in `precondition_noise`")
    # The power in which σ is equally spaced; the exponential schedule is its limit, in ln σ.
    ramp = torch.linspace(0, 1, config.num_train_timesteps, dtype=torch.float64)
    if config.sigma_schedule == "karras":
        low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
        sigmas = (low + ramp * (high - low)) ** config.rho
    else:
        low, high = math.log(config.sigma_min), math.log(config.sigma_max)
        sigmas = (low + ramp * (high - low)).exp()
    return _EDM(sigmas, config.sigma_data)


def _flow_of(scheduler: SchedulerMixin, shift_key: str) -> _Process:
    config = scheduler.config
    missing = [key for key in ("num_train_timesteps", shift_key) if key not in config]
    if missing:
        raise _unserved(scheduler, " and ".join(f"`{key}`" for key in missing) + " in its config")
    if config.get("invert_sigmas"):
        raise _unserved(scheduler, "timesteps that grow with the noise (`invert_sigmas` reverses them)")
    # A dynamic shift depends on the image size and is made when sampling: the training grid is not shifted.
    shift = 1.0 if config.get("use_dynamic_shifting") else config[shift_key]
    return _Flow(config.num_train_timesteps, shift)


def _prediction_type_of(scheduler: SchedulerMixin, process: _Process) -> str:
    # Flow matching schedulers proper have no such setting.
    default = "flow_prediction" if isinstance(process, _Flow) else None
    prediction_type = scheduler.config.get("prediction_type", default)
    if prediction_type not in process.prediction_types:
        allowed = ", ".join(f'"{name}"' for name in process.prediction_types)
        raise _unserved(scheduler, f"a `prediction_type` among {allowed} (it is {prediction_type!r})")
    return process.prediction_types[prediction_type]


def _unserved(scheduler: SchedulerMixin, missing: str) -> TypeError:
    return TypeError(f"`scheduler` cannot be trained with here: {type(scheduler).__name__} lacks {missing}.")


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


def _wide(sample: Tensor) -> torch.dtype:
    return torch.promote_types(sample.dtype, torch.float32)


def _scalar_dtype(timesteps: Tensor) -> torch.dtype:
    return torch.float32 if timesteps.device.type == "mps" else torch.float64  # Apple GPUs have no float64


def _per_sample(values: Tensor, sample: Tensor) -> Tensor:
    """Scalars `(B,)` made to broadcast over `sample` `(B, ...)`, on its device and in at least float32."""
    return values.to(sample.device, _wide(sample)).view(-1, *[1] * (sample.ndim - 1))


def _mix(scale: Tensor, sample: Tensor, other_scale: Tensor, other: Tensor) -> Tensor:
    """scale·sample + other_scale·other, one scale per sample, in the dtype of `sample`."""
    return (_per_sample(scale, sample) * sample + _per_sample(other_scale, sample) * other).to(sample.dtype)
