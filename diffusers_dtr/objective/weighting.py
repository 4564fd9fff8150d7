"""Weighting: how much one sample's squared error counts, given its noise level."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..noise_levels import NoiseLevels
from ..ranges import NON_NEGATIVE, POSITIVE


WEIGHTINGS = ("constant", "min_snr", "soft_min_snr", "p2", "debiased", "edm", "logit_normal")


def sample_weights(
    levels: NoiseLevels,
    timesteps: Tensor,
    weighting: str | Callable[[NoiseLevels, Tensor], Tensor] = "constant",
    *,
    snr_gamma: float = 5.0,
    p2_k: float = 1.0,
    p2_gamma: float = 1.0,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> Tensor:
    """Weight of each sample's mean squared error in the denoiser's prediction space.

    Papers state a weight for one prediction type. It is converted to the scheduler's: a squared error of the output
    is, for instance, one of the clean sample that is 1/SNR (epsilon) or 1/(SNR + 1) times (v_prediction) as large.

    | `weighting` | weight | on the error of | source |
    | --- | --- | --- | --- |
    | "constant" | 1 | the output | Ho et al., arXiv 2006.11239, Eq. 14 |
    | "min_snr" | min(SNR, γ) | the clean sample | Hang et al., arXiv 2303.09556, Section 3.4 |
    | "soft_min_snr" | 1/(1/SNR + 1/γ) | the clean sample | Crowson et al., arXiv 2401.11605, soft-min-SNR |
    | "p2" | 1/(k + SNR)^γ | the noise | Choi et al., arXiv 2204.00227, Eq. 8 |
    | "debiased" | 1/√SNR | the noise | Yu et al., arXiv 2310.08442, the proposed weight |
    | "edm" | SNR + 1/σ_data² | the clean sample | Karras et al., arXiv 2206.00364, Table 1, λ(σ) |
    | "logit_normal" | logit-normal density of σ | the flow | Esser et al., arXiv 2403.03206, Eq. 19 |

    All are finite at every noise level. Where SNR 0 would make a weight infinite ("debiased" and "edm" for predicted
    noise), it counts as 2⁻²⁴, the value with which diffusers solves for the clean sample.

    Args:
        levels: Noise levels of the training scheduler.
        timesteps: `(B,)`, as the denoiser is called with.
        weighting: A name from the table, or a function of `(levels, timesteps)` that returns `(B,)` weights.
        snr_gamma: γ > 0 of "min_snr" and "soft_min_snr".
        p2_k: k > 0 of "p2".
        p2_gamma: γ ≥ 0 of "p2".
        logit_mean: Location of "logit_normal"; positive values favour noisy samples.
        logit_std: Scale > 0 of "logit_normal".

    Returns:
        Weights `(B,)` on the device of `timesteps`, non-negative and in float64 for the names above.

    Raises:
        ValueError: If `weighting` is unknown, a number is out of its range, "logit_normal" meets a prediction other
            than flow, or a function's result is not `(B,)`.

    Example:
        >>> import torch
        >>> from diffusers import DDPMScheduler
        >>> from diffusers_dtr.noise_levels import NoiseLevels
        >>> from diffusers_dtr.objective.weighting import sample_weights
        >>> levels = NoiseLevels(DDPMScheduler())
        >>> sample_weights(levels, torch.tensor([0, 500, 999]), "min_snr", snr_gamma=5.0)
        tensor([5.0005e-04, 1.0000e+00, 1.0000e+00], dtype=torch.float64)
    """
    if callable(weighting):
        weights = weighting(levels, timesteps)
        if weights.shape != timesteps.shape:
            raise ValueError(
                f"`weighting` must return weights of shape {tuple(timesteps.shape)}, got {tuple(weights.shape)}."
            )
        return weights
    if weighting not in WEIGHTINGS:
        allowed = ", ".join(f'"{name}"' for name in WEIGHTINGS)
        raise ValueError(f"`weighting` must be one of {allowed}, or a function, got {weighting!r}.")
    if weighting == "logit_normal" and levels.prediction_type != "flow":
        raise ValueError(
            f'`weighting="logit_normal"` is defined for flow prediction, got "{levels.prediction_type}": '
            'use a flow matching scheduler, or another weighting such as "min_snr".'
        )
    POSITIVE.check(snr_gamma=snr_gamma, p2_k=p2_k, logit_std=logit_std)
    NON_NEGATIVE.check(p2_gamma=p2_gamma)

    # A weight w on the clean sample's error is w·clean on the output's, one on the noise's is w·noise;
    # noise = SNR·clean.
    clean, noise = levels.clean_gain(timesteps), levels.noise_gain(timesteps)
    formulas: dict[str, Callable[[], Tensor]] = {
        "constant": lambda: torch.ones_like(clean),
        "min_snr": lambda: torch.minimum(noise, snr_gamma * clean),
        "soft_min_snr": lambda: 1 / (1 / noise + 1 / (snr_gamma * clean)),
        "p2": lambda: noise / (p2_k + noise / clean) ** p2_gamma,
        "debiased": lambda: (noise * clean).sqrt(),
        "edm": lambda: noise + clean / levels.sigma_data**2,
        "logit_normal": lambda: _logit_normal_density(-levels.log_snr(timesteps) / 2, logit_mean, logit_std),
    }
    return formulas[weighting]()


def _logit_normal_density(logit: Tensor, mean: float, std: float) -> Tensor:
    """Density at σ of a variable whose logit is normal, from logit(σ), which is log(σ/(1 − σ)) = −½·log SNR."""
    logit = logit.clamp(-1e6, 1e6)  # the density is 0 there already, and ∞ − ∞ beyond
    # In logarithms: 1/(σ·(1 − σ)) = e^|x|·(1 + e^−|x|)² for x = logit(σ).
    size = logit.abs()
    log_density = size + 2 * torch.log1p((-size).exp()) - 0.5 * ((logit - mean) / std) ** 2
    return log_density.exp() / (std * math.sqrt(2 * math.pi))
