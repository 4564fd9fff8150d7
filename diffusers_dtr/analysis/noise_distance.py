"""Task affinity by the distance of noise levels: the first observation of ANT (arXiv 2306.00354)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..extras import require
from .task_affinity import TaskAffinity


def noise_distances(affinity: TaskAffinity) -> tuple[Tensor, Tensor]:
    """Distance in log SNR and affinity of every pair of different timesteps.

    Args:
        affinity: Of n timesteps. Those of infinite log SNR (pure noise, pure signal) are left out.

    Returns:
        |Δ log SNR| and affinity, float64 `(pairs,)` each.
    """
    finite = affinity.log_snr.isfinite()
    log_snr, matrix = affinity.log_snr[finite], affinity.matrix[finite][:, finite]
    row, column = torch.triu_indices(len(log_snr), len(log_snr), offset=1)
    return (log_snr[row] - log_snr[column]).abs(), matrix[row, column]


def noise_distance_correlation(affinity: TaskAffinity) -> float:
    """Spearman's rank correlation of affinity and |Δ log SNR| over all pairs of timesteps.

    Args:
        affinity: Of at least three timesteps of finite log SNR.

    Returns:
        A number in [-1, 1]: -1 if affinity falls with every step apart, about 0 if distance says nothing.

    Raises:
        ImportError: Without SciPy.
        ValueError: For fewer timesteps.
    """
    require("scipy", "analysis", "Rank correlations")
    from scipy import stats

    distances, affinities = noise_distances(affinity)
    if len(distances) < 2:
        raise ValueError("`affinity` must be of at least three timesteps of finite log SNR.")
    return float(stats.spearmanr(distances.numpy(), affinities.numpy()).statistic)
