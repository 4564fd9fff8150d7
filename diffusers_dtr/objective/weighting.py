"""Weighting: how much one sample's squared error counts, given its noise level.

A weighting is a function of `(levels, timesteps)` that returns `(B,)` weights: finite at every noise level,
non-negative, and float64.

Papers state a weight for one prediction type. It is converted to the scheduler's: a squared error of the output is,
for instance, one of the clean sample that is 1/SNR (epsilon) or 1/(SNR + 1) times (v_prediction) as large. Where SNR 0
would make a weight infinite ([`debiased`] and [`edm`] for predicted noise), it counts as 2⁻²⁴, as in diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise_levels import NoiseLevels
from ..ranges import COUNT, FINITE, NON_NEGATIVE, POSITIVE


# In the formulas, a weight w on the clean sample's error is w·clean_gain on the output's, one on the noise's is
# w·noise_gain; noise_gain = SNR·clean_gain.


def constant(levels: NoiseLevels, timesteps: Tensor) -> Tensor:
    """1 on the error of the output (Ho et al., arXiv 2006.11239, Eq. 14)."""
    return torch.ones_like(levels.clean_gain(timesteps))


def debiased(levels: NoiseLevels, timesteps: Tensor) -> Tensor:
    """1/√SNR on the error of the noise (Yu et al., arXiv 2310.08442, the proposed weight)."""
    return (levels.noise_gain(timesteps) * levels.clean_gain(timesteps)).sqrt()


def edm(levels: NoiseLevels, timesteps: Tensor) -> Tensor:
    """SNR + 1/σ_data² on the error of the clean sample (Karras et al., arXiv 2206.00364, Table 1, λ(σ))."""
    return levels.noise_gain(timesteps) + levels.clean_gain(timesteps) / levels.sigma_data**2


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, γ) on the error of the clean sample (Hang et al., arXiv 2303.09556, Section 3.4); γ > 0."""

    gamma: float = 5.0

    def __post_init__(self):
        POSITIVE.check(gamma=self.gamma)

    def __call__(self, levels: NoiseLevels, timesteps: Tensor) -> Tensor:
        return torch.minimum(levels.noise_gain(timesteps), self.gamma * levels.clean_gain(timesteps))


@dataclass(frozen=True)
class SoftMinSNR(MinSNR):
    """1/(1/SNR + 1/γ) on the error of the clean sample (Crowson et al., arXiv 2401.11605, soft-min-SNR); γ > 0."""

    def __call__(self, levels: NoiseLevels, timesteps: Tensor) -> Tensor:
        return 1 / (1 / levels.noise_gain(timesteps) + 1 / (self.gamma * levels.clean_gain(timesteps)))


@dataclass(frozen=True)
class P2:
    """1/(k + SNR)^γ on the error of the noise (Choi et al., arXiv 2204.00227, Eq. 8); k > 0 and γ >= 0."""

    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self):
        POSITIVE.check(k=self.k)
        NON_NEGATIVE.check(gamma=self.gamma)

    def __call__(self, levels: NoiseLevels, timesteps: Tensor) -> Tensor:
        clean, noise = levels.clean_gain(timesteps), levels.noise_gain(timesteps)
        return noise / (self.k + noise / clean) ** self.gamma


@dataclass(frozen=True)
class LogitNormal:
    r"""The logit-normal distribution of timesteps (SD3, arXiv 2403.03206, Eq. 19), to weight by or to draw from.

    As in the paper, u in (0, 1) is the time before the schedule's shift (Eq. 23), which is σ where there is none, and
    logit(u) is normal, of a finite mean and a std > 0: a positive mean favours noisy timesteps. Uniformly drawn
    timesteps that are weighted by its density give the loss the expectation it has for timesteps drawn from it,
    whatever the shift. (diffusers' scripts count u from the other end: their `logit_mean` is the negative of this.)
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        FINITE.check(mean=self.mean)
        POSITIVE.check(std=self.std)

    def __call__(self, levels: NoiseLevels, timesteps: Tensor) -> Tensor:
        """Density of u, `(B,)`; a ValueError for a prediction type other than flow."""
        if levels.prediction_type != "flow":
            raise ValueError(
                f'`weighting="logit_normal"` is defined for flow prediction, got "{levels.prediction_type}": '
                'use a flow matching scheduler, or another weighting such as "min_snr".'
            )
        # logit(σ) = log(σ/(1 − σ)) = −½·log SNR, from which a shift is a constant away.
        logit = -levels.log_snr(timesteps) / 2 - math.log(levels.shift)
        logit = logit.clamp(-1e6, 1e6)  # the density is 0 there already, and ∞ − ∞ beyond
        # In logarithms: 1/(u·(1 − u)) = e^|x|·(1 + e^−|x|)² for x = logit(u).
        size = logit.abs()
        log_density = size + 2 * torch.log1p((-size).exp()) - 0.5 * ((logit - self.mean) / self.std) ** 2
        return log_density.exp() / (self.std * math.sqrt(2 * math.pi))

    def probabilities(self, num_timesteps: int) -> Tensor:
        r"""Probability of each of T >= 1 training timesteps: the $\lfloor uT \rfloor$-th in ascending noise level.

        Positive float64 `(T,)` on the CPU, of sum 1.
        """
        COUNT.check(num_timesteps=num_timesteps)
        edges = torch.arange(num_timesteps + 1, dtype=torch.float64, device="cpu") / num_timesteps
        quantiles = (edges.logit() - self.mean) / self.std
        below, above = torch.special.ndtr(quantiles), torch.special.ndtr(-quantiles)
        # Each tail from its own end, where 1 - Φ would have no digits left.
        probabilities = torch.where(quantiles[1:] > 0, above[:-1] - above[1:], below.diff())
        # Beyond float64's range a timestep is as good as never drawn, but can be divided by.
        return probabilities.clamp(min=torch.finfo(torch.float64).tiny)


Weighting = Callable[[NoiseLevels, Tensor], Tensor]

WEIGHTINGS: Mapping[str, Weighting] = {
    "constant": constant,
    "min_snr": MinSNR(),
    "soft_min_snr": SoftMinSNR(),
    "p2": P2(),
    "debiased": debiased,
    "edm": edm,
    "logit_normal": LogitNormal(),
}


def make_weighting(weighting: str | Weighting) -> Weighting:
    """The weighting of a name in `WEIGHTINGS`, or the function given; a ValueError for another name."""
    if callable(weighting):
        return weighting
    if weighting not in WEIGHTINGS:
        allowed = ", ".join(f'"{name}"' for name in WEIGHTINGS)
        raise ValueError(f"`weighting` must be one of {allowed}, or a function, got {weighting!r}.")
    return WEIGHTINGS[weighting]
