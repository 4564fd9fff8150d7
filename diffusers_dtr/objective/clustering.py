"""Clusters of timesteps, and interval clustering: the exact optimum over all ways of cutting the timesteps.

ANT (Addressing Negative Transfer in Diffusion Models, arXiv 2306.00354, Section 4.2) groups the timesteps into
contiguous clusters, which are then balanced as the tasks of a multi-task problem.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ..noise_levels import NoiseLevels
from .timestep_sampling import draw_stratified, stratified_density


if TYPE_CHECKING:
    from matplotlib.axes import Axes


COSTS = ("uniform", "timestep", "snr")


@dataclass(frozen=True, repr=False)
class TimestepClusters:
    """Contiguous clusters of the timesteps of a training grid, in ascending noise level.

    Iterating, indexing and `len` go over the clusters as half-open `range` objects, which tile [0, T) exactly. They
    hold grid indices; on a discrete schedule these are the timesteps themselves. Instances are immutable, and equal if
    their clusters and grids are.

    Args:
        boundaries: The k + 1 strictly increasing integer edges, from 0 to T.
        timesteps: The T strictly increasing training timesteps, where they are real-valued (flow matching, EDM). They
            are kept in float32, the type denoisers are called with. Left out, and the same as, 0, 1, ..., T - 1.

    Raises:
        ValueError: For boundaries that are not integers, do not begin with 0 or do not increase, or timesteps that are
            not T increasing finite numbers.

    Example:
        >>> import torch
        >>> from diffusers_dtr.objective.clustering import TimestepClusters
        >>> clusters = TimestepClusters([0, 250, 1000])
        >>> list(clusters)
        [range(0, 250), range(250, 1000)]
        >>> clusters.assign(torch.tensor([0, 249, 250, 999]))
        tensor([0, 0, 1, 1])
        >>> clusters.sample(4, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([4])
    """

    boundaries: tuple[int, ...]
    timesteps: tuple[float, ...] | None = None
    _tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, compare=False
    )

    def __post_init__(self):
        object.__setattr__(self, "boundaries", _checked_boundaries(self.boundaries))
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", _checked_grid(self.timesteps, self.num_train_timesteps))

    @property
    def num_clusters(self) -> int:
        """The number k of clusters."""
        return len(self.boundaries) - 1

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of timesteps in the training grid."""
        return self.boundaries[-1]

    def __len__(self) -> int:
        return self.num_clusters

    def __getitem__(self, index: int) -> range:
        index = range(self.num_clusters)[index]
        return range(self.boundaries[index], self.boundaries[index + 1])

    def __iter__(self) -> Iterator[range]:
        return (range(start, end) for start, end in pairwise(self.boundaries))

    def __repr__(self) -> str:
        grid = "" if self.timesteps is None else f", timesteps=({self.timesteps[0]:g}, ..., {self.timesteps[-1]:g})"
        return f"{type(self).__name__}({self.boundaries}{grid})"

    def assign(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The cluster of each timestep, without waiting for the device.

        A timestep that is not in the training grid belongs with the grid's nearest one; halfway between two, with the
        noisier.

        Args:
            timesteps: `(batch,)`, of any real type. On a CPU a NaN is an error; elsewhere it is not looked for.

        Returns:
            int64 tensor `(batch,)` in [0, k) on the device of `timesteps`.

        Raises:
            ValueError: For a NaN timestep on a CPU.
        """
        _, cluster_edges = self._midpoints(timesteps.device)
        return _count_reached(cluster_edges, timesteps)

    def sample(
        self,
        batch_size: int,
        *,
        shares: torch.Tensor | Sequence[float] | None = None,
        importance: torch.Tensor | Sequence[float] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> torch.Tensor:
        """Draw timesteps of which every cluster gets its share, in random order.

        With the default equal shares, each cluster gets ⌊B/k⌋ or ⌈B/k⌉ of the B timesteps, and is as likely as any
        other to get one of the remainder. Where clusters differ in width this is not the uniform distribution: a loss
        divided by [`density`] keeps the expectation it has under uniform timesteps, one that is not counts every
        cluster alike. `shares=[len(cluster) for cluster in clusters]` draws uniform timesteps, stratified.

        Several processes with generators in the same state draw one global batch of `batch_size * num_processes`
        timesteps together, the same for any number of processes, and each gets its part.

        Args:
            batch_size: Timesteps to return, >= 1.
            shares: `(k,)`, nonnegative: relative numbers of samples of the clusters.
            importance: `(T,)`, nonnegative, with a positive sum in each cluster: relative probabilities within a
                cluster, in the order of the training grid.
            generator: CPU generator. May be left out with one process only.
            device: Where the result lies; the CPU by default.
            process_index: This process's number, in [0, num_processes).
            num_processes: How many processes share the global batch.

        Returns:
            `(batch_size,)`: int64 timesteps, or float32 ones on a real-valued training grid.

        Raises:
            ValueError: As [`draw_stratified`].
        """
        indices = draw_stratified(
            self.boundaries,
            batch_size,
            shares=shares,
            importance=importance,
            generator=generator,
            process_index=process_index,
            num_processes=num_processes,
        )
        return _to_device(indices if self.timesteps is None else self._grid()[indices], device)

    def density(
        self,
        timesteps: torch.Tensor,
        *,
        shares: torch.Tensor | Sequence[float] | None = None,
        importance: torch.Tensor | Sequence[float] | None = None,
    ) -> torch.Tensor:
        """How much more often than uniformly [`sample`] draws these timesteps; 1 everywhere for equal clusters.

        A loss divided by it has the expectation it would have under uniform timesteps.

        Args:
            timesteps: `(batch,)`, as in [`assign`].
            shares: What [`sample`] was called with.
            importance: What [`sample`] was called with.

        Returns:
            float32 tensor `(batch,)` on the device of `timesteps`.

        Raises:
            ValueError: As [`draw_stratified`] and [`assign`].
        """
        midpoints, _ = self._midpoints(timesteps.device)
        density = stratified_density(self.boundaries, shares=shares, importance=importance).float()
        return _to_device(density, timesteps.device)[_count_reached(midpoints, timesteps)]

    def to_dict(self) -> dict[str, list]:
        """What [`from_dict`] restores the clusters from, of JSON types only."""
        grid = {} if self.timesteps is None else {"timesteps": list(self.timesteps)}
        return {"boundaries": list(self.boundaries), **grid}

    @classmethod
    def from_dict(cls, config: dict[str, list]) -> TimestepClusters:
        """Restore clusters from [`to_dict`].

        Args:
            config: The key `boundaries`, and `timesteps` for a real-valued training grid.

        Returns:
            The clusters.

        Raises:
            ValueError: For other keys than these, and as the class.
        """
        if "boundaries" not in config or not config.keys() <= {"boundaries", "timesteps"}:
            raise ValueError(
                f"`config` must have the key 'boundaries' and may have 'timesteps', got {sorted(config)}."
            )
        return cls(**config)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Shade the clusters along the timestep axis, for instance behind a curve of loss by timestep.

        Args:
            ax: matplotlib Axes to draw on; those of a new figure by default.

        Returns:
            The Axes, where every cluster is a labelled span.

        Raises:
            ImportError: Without matplotlib.
        """
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError("Plots need matplotlib: pip install 'diffusers-dtr[training]'.") from error
            ax = pyplot.subplots()[1]
        grid = self._grid()
        _, cluster_edges = self._midpoints(grid.device)
        edges = [float(grid[0]), *cluster_edges.tolist(), float(grid[-1])]
        for cluster, (left, right) in enumerate(pairwise(edges)):
            ax.axvspan(left, right, color=f"C{cluster % 10}", alpha=0.2, linewidth=0, label=f"cluster {cluster}")
        ax.set_xlabel("timestep")
        return ax

    def _grid(self) -> torch.Tensor:
        """The training timesteps, float32 `(T,)` on the CPU."""
        grid = range(self.num_train_timesteps) if self.timesteps is None else self.timesteps
        return torch.tensor(grid, dtype=torch.float32, device="cpu")

    def _midpoints(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Halfway marks between neighbours in the grid `(T - 1,)`, and those at which a cluster begins `(k - 1,)`.

        A timestep's nearest grid index is the number of marks that it reaches.
        """
        if device not in self._tables:
            grid = self._grid().double()
            midpoints = (grid[1:] + grid[:-1]) / 2
            cluster_edges = midpoints[[edge - 1 for edge in self.boundaries[1:-1]]]
            real = _widest_float(device)
            self._tables[device] = midpoints.to(device, real), cluster_edges.to(device, real)
        return self._tables[device]


def cluster_timesteps(
    noise_scheduler: Any, num_clusters: int = 8, cost: str | torch.Tensor | Sequence[Sequence[float]] = "snr"
) -> TimestepClusters:
    r"""Cut the timesteps into contiguous clusters of the smallest total cost (ANT, arXiv 2306.00354, Section 4.2).

    A cluster from l to r (both inclusive) with the centre $c = \lfloor (l + r) / 2 \rfloor$ costs, by `cost`:

    * `"timestep"`: $\sum_t (t - c)^2$
    * `"snr"`: $\sum_t |\log \mathrm{SNR}(t) - \log \mathrm{SNR}(c)|$
    * a task affinity matrix A: $-\sum_t A_{c,t}$
    * `"uniform"`: nothing; the clusters are as equal in width as can be, with edges $\lfloor iT/k \rfloor$.

    Dynamic programming in float64 finds the global optimum. Of equally good clusterings it takes the one whose first
    inner edge is lowest, then whose second is, and so on. (The authors' code rounds the centre upwards and misses the
    optimum by one timestep in places. The SNR enters as its logarithm: on raw SNR almost all timesteps fall into one
    cluster.)

    A timestep of pure noise (SNR 0: the last one with zero terminal SNR, and in flow matching) or of pure signal is
    infinitely far from every other one, wherever the edges are, and so has no say in where they should be: with
    `"snr"` the others are clustered, and it joins the cluster at its end.

    On real-valued training grids (flow matching, EDM), t, l, r and c are indices into the grid, in ascending noise
    level.

    Args:
        noise_scheduler: diffusers scheduler whose training timesteps are clustered, or their number T >= 1 where the
            cost needs no more.
        num_clusters: k, in [1, T].
        cost: One of the names above, or a finite `(T, T)` matrix.

    Returns:
        The clusters.

    Raises:
        ValueError: For `num_clusters` outside [1, T], T < 1, an unknown cost, `"snr"` without a scheduler, or a matrix
            that is not finite or not T × T.
        TypeError: For a scheduler whose noise levels are unknown.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> from diffusers_dtr.objective.clustering import cluster_timesteps
        >>> clusters = cluster_timesteps(DDPMScheduler(), num_clusters=4)
        >>> clusters.boundaries
        (0, 221, 522, 779, 1000)
    """
    levels = None if isinstance(noise_scheduler, int) else NoiseLevels(noise_scheduler)
    num_timesteps = noise_scheduler if levels is None else len(levels.timesteps)
    if num_timesteps < 1 or isinstance(num_timesteps, bool):
        raise ValueError(f"`noise_scheduler` must be a scheduler or a number of timesteps >= 1, got {num_timesteps}.")
    _check_num_clusters(num_clusters, num_timesteps)

    if isinstance(cost, str):
        if cost == "uniform":
            boundaries = [i * num_timesteps // num_clusters for i in range(num_clusters + 1)]
        elif cost == "timestep":
            index = torch.arange(num_timesteps, dtype=torch.float64, device="cpu")
            boundaries = _cheapest_boundaries((index[:, None] - index).square_(), num_clusters)
        elif cost == "snr":
            boundaries = _log_snr_boundaries(levels, num_clusters)
        else:
            raise ValueError(f"`cost` must be one of {', '.join(COSTS)} or an affinity matrix, got {cost!r}.")
    else:
        boundaries = _cheapest_boundaries(-_checked_affinity(cost, num_timesteps), num_clusters)
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


def _cheapest_boundaries(distance: torch.Tensor, num_clusters: int) -> list[int]:
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


def _interval_costs(distance: torch.Tensor) -> torch.Tensor:
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


def _checked_affinity(affinity: torch.Tensor | Sequence[Sequence[float]], num_timesteps: int) -> torch.Tensor:
    affinity = torch.as_tensor(affinity, dtype=torch.float64, device="cpu")
    if affinity.shape != (num_timesteps, num_timesteps):
        raise ValueError(
            f"`cost`, an affinity matrix, must have the shape ({num_timesteps}, {num_timesteps}), "
            f"got {tuple(affinity.shape)}."
        )
    lowest, highest = affinity.aminmax()
    if not (lowest.isfinite() and highest.isfinite()):
        row, column = (~affinity.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"`cost`, an affinity matrix, must be finite, got {float(affinity[row, column])} at ({row}, {column})."
        )
    return affinity


def _check_num_clusters(num_clusters: int, num_timesteps: int, kind: str = "") -> None:
    if isinstance(num_clusters, bool) or not isinstance(num_clusters, int) or not 1 <= num_clusters <= num_timesteps:
        raise ValueError(
            f"`num_clusters` must be an integer in [1, {num_timesteps}], the number of timesteps{kind}, "
            f"got {num_clusters!r}."
        )


def _count_reached(marks: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    if timesteps.is_floating_point() and timesteps.device.type == "cpu" and timesteps.isnan().any():
        raise ValueError(f"`timesteps` must be numbers, got NaN at index {int(timesteps.isnan().nonzero()[0])}.")
    return torch.bucketize(timesteps.to(marks.dtype), marks, right=True)


def _widest_float(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _to_device(tensor: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    if device is None:
        return tensor
    # CUDA stages what is not pinned before the call returns, so that not waiting is safe there.
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def _checked_boundaries(boundaries: Sequence[int]) -> tuple[int, ...]:
    try:
        edges = tuple(operator.index(edge) for edge in boundaries)
    except TypeError as error:
        raise ValueError(f"`boundaries` must be integers, got {boundaries!r}.") from error
    if len(edges) < 2 or edges[0] != 0 or any(start >= end for start, end in pairwise(edges)):
        raise ValueError(f"`boundaries` must begin with 0 and increase to the number of timesteps, got {list(edges)}.")
    return edges


def _checked_grid(timesteps: Sequence[float] | torch.Tensor, num_timesteps: int) -> tuple[float, ...] | None:
    """The grid as float32 numbers, or None for 0, 1, ..., T - 1."""
    grid = torch.as_tensor(timesteps, dtype=torch.float32, device="cpu")
    if grid.shape != (num_timesteps,):
        raise ValueError(
            f"`timesteps` must hold one number for each of the {num_timesteps} timesteps of `boundaries`, "
            f"got shape {tuple(grid.shape)}."
        )
    if not (grid.isfinite().all() and (grid.diff() > 0).all()):
        raise ValueError("`timesteps` must be finite and strictly increasing, in ascending noise level.")
    if torch.equal(grid, torch.arange(num_timesteps, dtype=torch.float32, device="cpu")):
        return None
    return tuple(grid.tolist())
