"""The posterior of a discrete diffusion, and the bound that trains a learned variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .timestep_table import TimestepTable, per_sample


class Posterior:
    """q(x_{t−1} | x_t, x_0) of a schedule made of betas (Ho et al., arXiv 2006.11239, Eq. 6 and 7)."""

    def __init__(self, alphas_cumprod: Tensor):
        previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        betas = 1 - alphas_cumprod / previous
        variance = betas * (1 - previous) / (1 - alphas_cumprod)
        # At t = 0 the posterior is a point: the decoder takes its place, with the variance of t = 1.
        variance[0] = variance[1] if len(variance) > 1 else betas[0]
        self._clean_share = TimestepTable(betas * previous.sqrt() / (1 - alphas_cumprod))
        self._log_variance = TimestepTable(variance.log())
        self._log_beta = TimestepTable(betas.log())

    def bound(self, predicted_clean: Tensor, variance_values: Tensor, clean: Tensor, timesteps: Tensor) -> Tensor:
        """Bits per dimension `(B,)`. x_t enters both means alike, so only the clean samples are compared."""
        clean_share, true_log_variance, log_beta = (
            per_sample(table(timesteps), clean) for table in (self._clean_share, self._log_variance, self._log_beta)
        )
        # Nichol and Dhariwal, Eq. 15, with values in [−1, 1] instead of [0, 1].
        log_variance = torch.lerp(true_log_variance, log_beta, (variance_values + 1) / 2)
        mean_difference = clean_share * (clean - predicted_clean)
        log_ratio = true_log_variance - log_variance
        divergence = 0.5 * (log_ratio.exp() - 1 - log_ratio + mean_difference**2 * (-log_variance).exp())
        # At t = 0 the share of x_t in the mean is 0 and that of the clean sample is 1.
        decoder = -_discretized_gaussian_log_likelihood(clean, predicted_clean, 0.5 * log_variance)
        at_start = per_sample(timesteps, clean) == 0
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
