"""The forward process of a diffusers scheduler. Only this module knows scheduler classes."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler, SchedulerMixin, UnCLIPScheduler
from torch import Tensor

from .timestep_table import TimestepTable, is_discrete, scalar_dtype


# The variance types with which a scheduler's `step` samples from the predicted variance. DPM-Solver and SASolver also
# take `variance_type`, but only to throw those channels away.
_LEARNED_VARIANCE_TYPES: Mapping[type, tuple[str, ...]] = {
    DDPMScheduler: ("learned", "learned_range"),
    DDPMParallelScheduler: ("learned", "learned_range"),
    UnCLIPScheduler: ("learned_range",),
}


def uses_learned_variance(scheduler: SchedulerMixin) -> bool:
    """Whether `scheduler.step` samples with a variance that the denoiser predicts; others want none, or discard it."""
    return any(
        isinstance(scheduler, cls) and scheduler.config.variance_type in variance_types
        for cls, variance_types in _LEARNED_VARIANCE_TYPES.items()
    )


class ForwardProcess(ABC):
    """A forward process: its training grid, and α and σ at any timestep."""

    scales_input: ClassVar[bool] = False
    shift: float = 1.0
    # The scheduler's `config.prediction_type` -> our name, for the types that are defined in this process.
    prediction_types: ClassVar[Mapping[str, str]] = {name: name for name in ("epsilon", "sample", "v_prediction")}

    def __init__(self, timesteps: Tensor, sigma_data: float = 1.0, alphas_cumprod: Tensor | None = None):
        self.timesteps = timesteps
        # The smallest and largest timestep that has a noise level.
        self.limits = timesteps[0].item(), timesteps[-1].item()
        self.sigma_data = sigma_data
        self.alphas_cumprod = alphas_cumprod

    def check_range(self, timesteps: Tensor) -> None:
        """A ValueError for timesteps outside the schedule on the CPU. Others are not read, which would be a wait."""
        if timesteps.device.type != "cpu":
            return
        limits = torch.tensor(self.limits, dtype=torch.float64, device="cpu")
        # A real-valued end of the grid is as round as the timesteps are.
        low, high = limits if is_discrete(self.timesteps) else limits.to(timesteps.dtype)
        if not ((low <= timesteps.double()) & (timesteps.double() <= high)).all():
            raise ValueError(
                f"`timesteps` must lie in [{limits[0]:g}, {limits[1]:g}], got {timesteps.min()} to {timesteps.max()}."
            )

    @abstractmethod
    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of the clean sample and of the noise, `(B,)` each, at timesteps `(B,)`."""


class VariancePreserving(ForwardProcess):
    """DDPM and its solvers: α² = ᾱ, σ² = 1 − ᾱ."""

    def __init__(self, alphas_cumprod: Tensor):
        super().__init__(torch.arange(len(alphas_cumprod), dtype=torch.float64), alphas_cumprod=alphas_cumprod)
        self._table = TimestepTable(alphas_cumprod)

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alphas_cumprod = self._table(timesteps)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


class VarianceExploding(ForwardProcess):
    """The k-diffusion style schedulers (Euler, Heun, KDPM2, LMS): α = 1, σ² = (1 − ᾱ)/ᾱ."""

    scales_input = True

    def __init__(self, alphas_cumprod: Tensor):
        super().__init__(torch.arange(len(alphas_cumprod), dtype=torch.float64), alphas_cumprod=alphas_cumprod)
        # Between two timesteps these schedulers interpolate σ itself.
        self._table = TimestepTable(((1 - alphas_cumprod) / alphas_cumprod).sqrt())

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self._table(timesteps)
        return torch.ones_like(sigma), sigma


class LogSigmaTime(ForwardProcess):
    """Variance exploding with the timestep ¼·ln σ: Euler with continuous timesteps."""

    scales_input = True

    def __init__(self, sigmas: Tensor, sigma_data: float = 1.0):
        super().__init__(sigmas.log() / 4, sigma_data)

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigma = (4 * timesteps.to(scalar_dtype(timesteps.device))).exp()
        return torch.ones_like(sigma), sigma


class EDM(LogSigmaTime):
    """EDM (Karras et al., arXiv 2206.00364): as above, with data of standard deviation σ_data."""

    prediction_types: ClassVar[Mapping[str, str]] = {"epsilon": "edm", "v_prediction": "v_prediction"}


class Flow(ForwardProcess):
    """Rectified flow: α = 1 − σ, and σ·T is the timestep, whatever the shift."""

    prediction_types: ClassVar[Mapping[str, str]] = {
        "flow_prediction": "flow",
        "epsilon": "epsilon",
        "sample": "sample",
    }

    def __init__(self, num_train_timesteps: int, shift: float):
        self.shift = shift
        sigmas = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        super().__init__(shift * sigmas / (1 + (shift - 1) * sigmas) * num_train_timesteps)
        self.limits = (
            0.0,
            float(num_train_timesteps),
        )  # every σ in [0, 1] is a noise level, between those of the grid too

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigma = timesteps.to(scalar_dtype(timesteps.device)) / len(self.timesteps)
        return 1 - sigma, sigma


def process_of(scheduler: SchedulerMixin) -> ForwardProcess:
    """The forward process that a scheduler trains with; a TypeError that names what it lacks if there is none."""
    if not hasattr(scheduler, "config"):
        raise TypeError(f"`scheduler` must be a diffusers scheduler, got {type(scheduler).__name__}.")
    config = _own_config(scheduler)
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
        return VariancePreserving(alphas_cumprod)
    if config.get("timestep_type") == "continuous" and config["prediction_type"] == "v_prediction":
        return LogSigmaTime(((1 - alphas_cumprod) / alphas_cumprod).sqrt())
    return VarianceExploding(alphas_cumprod)


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


def _edm_of(scheduler: SchedulerMixin) -> ForwardProcess:
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
    return EDM(sigmas, config.sigma_data)


def _flow_of(scheduler: SchedulerMixin, shift_key: str) -> ForwardProcess:
    config = _own_config(scheduler)
    missing = [key for key in ("num_train_timesteps", shift_key) if key not in config]
    if missing:
        raise _unserved(scheduler, " and ".join(f"`{key}`" for key in missing) + " in its config")
    if config.get("invert_sigmas"):
        raise _unserved(scheduler, "timesteps that grow with the noise (`invert_sigmas` reverses them)")
    # A dynamic shift depends on the image size and is made when sampling: the training grid is not shifted.
    shift = 1.0 if config.get("use_dynamic_shifting") else config[shift_key]
    return Flow(config["num_train_timesteps"], shift)


def prediction_type_of(scheduler: SchedulerMixin, process: ForwardProcess) -> str:
    """A scheduler's prediction type, by the names of [`NoiseLevels`]; a TypeError if its process has no such type."""
    # Flow matching schedulers proper have no such setting.
    default = "flow_prediction" if isinstance(process, Flow) else None
    prediction_type = _own_config(scheduler).get("prediction_type", default)
    if prediction_type not in process.prediction_types:
        allowed = ", ".join(f'"{name}"' for name in process.prediction_types)
        raise _unserved(scheduler, f"a `prediction_type` among {allowed} (it is {prediction_type!r})")
    return process.prediction_types[prediction_type]


def _own_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The settings of the scheduler's own class, without those that `from_config` keeps of another class."""
    names = inspect.signature(type(scheduler)).parameters
    return {name: value for name, value in scheduler.config.items() if name in names}


def _unserved(scheduler: SchedulerMixin, missing: str) -> TypeError:
    return TypeError(f"`scheduler` cannot be trained with here: {type(scheduler).__name__} lacks {missing}.")
