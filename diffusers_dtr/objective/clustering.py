"""Interval clustering: the exact optimum over all ways of cutting the timesteps into contiguous clusters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..noise_levels import NoiseLevels
from ..ranges import COUNT
from .clusters import TimestepClusters


COSTS = ("uniform", "timestep", "snr")


def cluster_timesteps(
    noise_scheduler: Any,
    num_clusters: int = 8,
    cost: str | Callable[[Tensor, Tensor], Tensor] | Tensor | Sequence[Sequence[float]] = "snr",
) -> TimestepClusters:
    r"""Cut the timesteps into contiguous clusters of the smallest total cost (ANT, arXiv 2306.00354, Section 4.2).

    A cluster from l to r (both inclusive) with the centre $c = \lfloor (l + r) / 2 \rfloor$ costs, by `cost`:

    * `"timestep"`: $\sum_t (t - c)^2$
    * `"snr"`: $\sum_t |\log \mathrm{SNR}(t) - \log \mathrm{SNR}(c)|$
    * a function d of two timesteps: $\sum_t d(c, t)$
    * a task affinity matrix A: $-\sum_t A_{c,t}$
    * `"uniform"`: nothing; the clusters are as equal in width as can be, with edges $\lfloor iT/k \rfloor$.

    Dynamic programming in float64 finds the global optimum; of equals, the one whose first inner edge is lowest, then
    whose second is, and so on. (The authors' code rounds the centre upwards and misses the optimum by one timestep in
    places. The SNR enters as its logarithm: on raw SNR almost all timesteps fall into one cluster.) A timestep of pure
    noise (SNR 0: the last one with zero terminal SNR, and in flow matching) or of pure signal is infinitely far from
    all others: with `"snr"` these are clustered, and it joins the cluster at its end. On real-valued training grids
    (flow matching, EDM), t, l, r and c are indices into the grid, in ascending noise level.

    Args:
        noise_scheduler: diffusers scheduler whose training timesteps are clustered, or their number T >= 1 where the
            cost needs no more.
        num_clusters: k, in [1, T].
        cost: One of the names above; a function, called with the float64 timesteps `(n,)` of n pairs, that returns
            their n finite costs; or a finite `(T, T)` matrix of affinities, which are maximised.

    Raises:
        ValueError: For an argument that is not allowed, or `"snr"` without a scheduler.
        TypeError: For a scheduler whose noise levels are unknown.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> from diffusers_dtr.objective import cluster_timesteps
        >>> clusters = cluster_timesteps(DDPMScheduler(), num_clusters=4)
        >>> clusters.boundaries
        (0, 221, 522, 779, 1000)
        >>> cluster_timesteps(DDPMScheduler(), num_clusters=4, cost=lambda c, t: (c - t) ** 2).boundaries
        (0, 249, 498, 749, 1000)
    """
    levels = None if isinstance(noise_scheduler, int) else NoiseLevels(noise_scheduler)
    num_timesteps = noise_scheduler if levels is None else len(levels.timesteps)
    if num_timesteps not in COUNT:
        raise ValueError(f"`noise_scheduler` must be a scheduler or a number of timesteps >= 1, got {num_timesteps}.")
    _check_num_clusters(num_clusters, num_timesteps)

    index = torch.arange(num_timesteps, dtype=torch.float64, device="cpu")
    if callable(cost):
        grid = index if levels is None else levels.timesteps
        pairs = cost(grid.repeat_interleave(num_timesteps), grid.repeat(num_timesteps))
        distance = _checked_matrix(pairs, "a function's result", (num_timesteps**2,)).view(num_timesteps, -1)
        boundaries = _cheapest_boundaries(distance, num_clusters)
    elif not isinstance(cost, str):
        affinity = _checked_matrix(cost, "an affinity matrix", (num_timesteps, num_timesteps))
        boundaries = _cheapest_boundaries(-affinity, num_clusters)
    elif cost == "uniform":
        boundaries = [i * num_timesteps // num_clusters for i in range(num_clusters + 1)]
    elif cost == "timestep":
        boundaries = _cheapest_boundaries((index[:, None] - index).square_(), num_clusters)
    elif cost == "snr":
        boundaries = _log_snr_boundaries(levels, num_clusters)
    else:
        raise ValueError(f"`cost` must be one of {', '.join(COSTS)}, a function or an affinity matrix, got {cost!r}.")
    return TimestepClusters(boundaries, timesteps=None if levels is None else levels.timesteps)


def _log_snr_boundaries(levels: NoiseLevels | None, num_clusters: int) -> list[int]:
    if levels is None:
        raise ValueError(
            "`cost='snr'` needs noise levels: pass the scheduler instead of a number of timesteps, or choose "
            "`cost='uniform'` or `cost='timestep'`."
        )
    log_snr = levels.log_snr(levels.timesteps).cpu()
    finite = log_snr.isfinite().nonzero()[:, 0]
    _check_num_clusters(num_clusters, len(finite), " of finite log SNR")
    log_snr = log_snr[finite]
    inner = _cheapest_boundaries((log_snr[:, None] - log_snr).abs_(), num_clusters)[1:-1]
    return [0, *(int(finite[0]) + edge for edge in inner), len(levels.timesteps)]


def _cheapest_boundaries(distance: Tensor, num_clusters: int) -> list[int]:
    """The k + 1 edges of the best clustering, for the `(T, T)` cost of each timestep (column) under a centre (row)."""
    cost = _interval_costs(distance)
    # tails[j][r]: the least cost of cutting what follows timestep r into j + 1 clusters.
    tails = []
    best = cost[:, -1]
    scratch = torch.empty_like(cost)
    for _ in range(num_clusters - 1):
        tails.append(torch.nn.functional.pad(best[1:], (0, 1), value=torch.inf))
        best = torch.add(cost, tails[-1], out=scratch).amin(dim=1)
    boundaries = [0]
    for tail in reversed(tails):
        # argmin takes the first of equal minima, which is the tie rule that is promised.
        boundaries.append(int((cost[boundaries[-1]] + tail).argmin()) + 1)
    return [*boundaries, len(cost)]


def _interval_costs(distance: Tensor) -> Tensor:
    """Cost of the cluster from timestep l (row) to r (column), both inclusive; infinite where r < l. `(T, T)`."""
    num_timesteps = len(distance)
    prefix = distance.new_zeros(num_timesteps, num_timesteps + 1)
    torch.cumsum(distance, dim=1, out=prefix[:, 1:])
    cost = torch.empty_like(distance)
    # cost[l, r] = prefix[c, r + 1] - prefix[c, l] with c = (l + r) // 2. For l and r of given parities the address
    # of either term is affine in l and r, so strided views read them without index tensors of the size of the result.
    step = num_timesteps + 1
    for l_odd in (0, 1):
        for r_odd in (0, 1):
            out = cost[l_odd::2, r_odd::2]
            first_center = l_odd & r_odd
            upper = prefix.as_strided(out.shape, (step, step + 2), first_center * step + r_odd + 1)
            lower = prefix.as_strided(out.shape, (step + 2, step), first_center * step + l_odd)
            torch.sub(upper, lower, out=out)
    return cost.masked_fill_(torch.ones_like(cost, dtype=torch.bool).tril_(-1), torch.inf)


def _checked_matrix(values: Tensor | Sequence[Sequence[float]], kind: str, shape: tuple[int, ...]) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if values.shape != shape:
        raise ValueError(f"`cost`, {kind}, must have the shape {shape}, got {tuple(values.shape)}.")
    if not values.isfinite().all():
        place = tuple((~values.isfinite()).nonzero()[0].tolist())
        raise ValueError(f"`cost`, {kind}, must be finite, got {float(values[place])} at {place}.")
    return values


def _check_num_clusters(num_clusters: int, num_timesteps: int, kind: str = "") -> None:
    if num_clusters not in COUNT or num_clusters > num_timesteps:
        raise ValueError(
            f"`num_clusters` must be an integer in [1, {num_timesteps}], the number of timesteps{kind}, "
            f"got {num_clusters!r}."
        )
