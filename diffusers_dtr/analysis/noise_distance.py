"""Whether affinity falls as noise levels part: the first observation of ANT (arXiv 2306.00354)."""

from __future__ import annotations

import torch
from torch import Tensor

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
        ValueError: For fewer timesteps.
    """
    distances, affinities = noise_distances(affinity)
    if len(distances) < 2:
        raise ValueError("`affinity` must be of at least three timesteps of finite log SNR.")
    return float(torch.corrcoef(torch.stack([_ranks(distances), _ranks(affinities)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks of values, equal ones sharing the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]
