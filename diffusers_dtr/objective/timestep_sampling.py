"""Stratified sampling: how a batch is divided among clusters, and which timesteps it draws within them.

Every sampler of this package draws here. A batch is allotted to the clusters by systematic resampling, which rounds
their fractional shares up or down without bias; within a cluster, timesteps are independent. The random numbers come
from a CPU generator and depend on the global batch alone, so any number of processes draws the same global batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ranges import COUNT


# Random fractions have this many bits: adding one to an integer below 2**21 is then exact in float64, so that rounding
# never carries a sample over into the next cluster.
_FRACTION_BITS = 32


def draw_stratified(
    boundaries: Sequence[int],
    batch_size: int,
    *,
    shares: torch.Tensor | Sequence[float] | None = None,
    importance: torch.Tensor | Sequence[float] | None = None,
    generator: torch.Generator | None = None,
    process_index: int = 0,
    num_processes: int = 1,
) -> torch.Tensor:
    r"""Draw one process's part of a global batch that is stratified over clusters of timesteps.

    Of a global batch of B samples, cluster i gets $\lfloor B q_i \rfloor$ or $\lceil B q_i \rceil$, and $B q_i$ on
    average, where $q_i$ is its share: one random offset u in [0, 1) puts sample m at the quantile (m + u) / B of the
    clusters (systematic resampling; Kitagawa 1996). The batch is then shuffled.

    Arguments and errors are those of `TimestepClusters.sample`, for the clusters' k + 1 increasing edges
    0, ..., T. The result is int64 `(batch_size,)` on the CPU: indices in [0, T).
    """
    COUNT.check(batch_size=batch_size, num_processes=num_processes)
    if not 0 <= process_index < num_processes:
        raise ValueError(f"`process_index` must be in [0, {num_processes}), got {process_index}.")
    _check_generator(generator, num_processes)
    edges = torch.tensor(boundaries, device="cpu")
    shares = _checked_shares(shares, len(edges) - 1)
    within = _distribution_within_clusters(importance, edges)

    num_samples = batch_size * num_processes
    clusters = _allot(shares, num_samples, generator)
    indices = _draw_within(within, edges, clusters, generator)
    order = torch.randperm(num_samples, generator=generator, device="cpu")
    return indices[order[process_index * batch_size : (process_index + 1) * batch_size]]


def stratified_density(
    boundaries: Sequence[int],
    *,
    shares: torch.Tensor | Sequence[float] | None = None,
    importance: torch.Tensor | Sequence[float] | None = None,
) -> torch.Tensor:
    r"""Density of [`draw_stratified`] at each timestep, relative to uniform ones.

    With share $q_i$ and importance a, a timestep of cluster i has the density $T q_i a_t / \sum_{s \in i} a_s$.
    The result is float64 `(T,)` of mean 1 on the CPU: T times each timestep's probability.
    """
    edges = torch.tensor(boundaries, device="cpu")
    shares = _checked_shares(shares, len(edges) - 1)
    within = _distribution_within_clusters(importance, edges)
    return len(within) * (shares / shares.sum()).repeat_interleave(edges.diff()) * within


def _allot(shares: torch.Tensor, num_samples: int, generator: torch.Generator | None) -> torch.Tensor:
    """The cluster of each sample, ascending, int64 `(num_samples,)`."""
    # Multiplied before it is divided, equal shares of a divisible batch end on integers to the bit.
    cumulative = shares.cumsum(0)
    ends = cumulative * num_samples / cumulative[-1]
    points = torch.arange(num_samples, device="cpu") + _random_fractions(1, generator)
    return torch.bucketize(points, ends[:-1], right=True)


def _draw_within(
    within: torch.Tensor, edges: torch.Tensor, clusters: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """One timestep index for each entry of `clusters`, by inverting the distribution function of its cluster."""
    cumulative = torch.nn.functional.pad(within.cumsum(0), (1, 0))
    starts = cumulative[edges[:-1]].repeat_interleave(edges.diff())
    ends = cumulative[edges[1:]].repeat_interleave(edges.diff())
    # Cluster i fills [i, i + 1] exactly, because x / x is 1.
    cluster_of_index = torch.arange(len(edges) - 1, device="cpu").repeat_interleave(edges.diff())
    cumulative = cluster_of_index + (cumulative[1:] - starts) / (ends - starts)
    return torch.bucketize(clusters + _random_fractions(len(clusters), generator), cumulative, right=True)


def _random_fractions(count: int, generator: torch.Generator | None) -> torch.Tensor:
    """Uniform in [0, 1), float64 `(count,)`."""
    return torch.randint(2**_FRACTION_BITS, (count,), generator=generator, device="cpu").double() / 2**_FRACTION_BITS


def _checked_shares(shares: torch.Tensor | Sequence[float] | None, num_clusters: int) -> torch.Tensor:
    if shares is None:
        return torch.ones(num_clusters, dtype=torch.float64, device="cpu")
    shares = _checked_weights("shares", shares, num_clusters)
    if not shares.sum() > 0:
        raise ValueError(f"`shares` must have a positive sum, got {shares.tolist()}.")
    return shares


def _distribution_within_clusters(
    importance: torch.Tensor | Sequence[float] | None, edges: torch.Tensor
) -> torch.Tensor:
    """Probability of each timestep given its cluster, float64 `(T,)`."""
    widths = edges.diff()
    if importance is None:
        return (1 / widths.double()).repeat_interleave(widths)
    importance = _checked_weights("importance", importance, int(edges[-1]))
    cluster_of_index = torch.arange(len(widths), device="cpu").repeat_interleave(widths)
    sums = importance.new_zeros(len(widths)).index_add(0, cluster_of_index, importance)
    if not (sums > 0).all():
        empty = int((sums <= 0).nonzero()[0])
        raise ValueError(f"`importance` must have a positive sum in each cluster, got 0 in cluster {empty}.")
    return importance / sums[cluster_of_index]


def _checked_weights(name: str, weights: torch.Tensor | Sequence[float], length: int) -> torch.Tensor:
    weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if weights.shape != (length,):
        raise ValueError(f"`{name}` must have the shape ({length},), got {tuple(weights.shape)}.")
    valid = weights.isfinite() & (weights >= 0)
    if not valid.all():
        index = int((~valid).nonzero()[0])
        raise ValueError(f"`{name}` must be finite and >= 0, got {float(weights[index])} at index {index}.")
    return weights


def _check_generator(generator: torch.Generator | None, num_processes: int) -> None:
    if generator is None:
        if num_processes > 1:
            raise ValueError(
                f"`generator` must be given when {num_processes} processes share a batch: pass each of them a "
                "`torch.Generator` of the same seed."
            )
    elif generator.device.type != "cpu":
        raise ValueError(
            f"`generator` must be on the CPU, so that all devices draw alike, got one on {generator.device}."
        )
