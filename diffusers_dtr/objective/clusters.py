"""Clusters of timesteps: contiguous ranges that tile the training grid, and the stratified draws of timesteps."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ..noise_levels import is_discrete, scalar_dtype
from ..ranges import COUNT


# Random fractions have this many bits: adding one to an integer below 2**21 is then exact in float64, so that rounding
# never carries a sample over into the next cluster.
_FRACTION_BITS = 32


@dataclass(frozen=True, repr=False)
class TimestepClusters:
    """Contiguous clusters of a training grid's timesteps, in ascending noise level: the tasks of ANT (2306.00354).

    Iterating, indexing and `len` go over the clusters as half-open `range` objects, which tile [0, T) exactly. They
    hold grid indices; on a discrete schedule these are the timesteps themselves. Instances are immutable, and equal if
    their clusters and grids are.

    Args:
        boundaries: The k + 1 strictly increasing integer edges, from 0 to T.
        timesteps: The T strictly increasing training timesteps, where they are real-valued (flow matching, EDM). They
            are kept in float32, the type denoisers are called with. Left out, and the same as, 0, 1, ..., T - 1.

    Raises:
        ValueError: For other boundaries, or timesteps that are not T increasing finite numbers.

    Example:
        >>> import torch
        >>> from diffusers_dtr.objective import TimestepClusters
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
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "boundaries", _checked_boundaries(self.boundaries))
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", _checked_grid(self.timesteps, self.num_train_timesteps))

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of timesteps in the training grid."""
        return self.boundaries[-1]

    def __len__(self) -> int:
        return len(self.boundaries) - 1

    def __getitem__(self, index: int) -> range:
        index = range(len(self))[index]
        return range(self.boundaries[index], self.boundaries[index + 1])

    def __iter__(self) -> Iterator[range]:
        return (range(start, end) for start, end in pairwise(self.boundaries))

    def __repr__(self) -> str:
        grid = "" if self.timesteps is None else f", timesteps=({self.timesteps[0]:g}, ..., {self.timesteps[-1]:g})"
        return f"{type(self).__name__}({self.boundaries}{grid})"

    def assign(self, timesteps: Tensor) -> Tensor:
        """Cluster of each timestep, without waiting for the device.

        A timestep that is not in the training grid belongs with the grid's nearest one; halfway between two, with the
        noisier.

        Args:
            timesteps: `(batch,)`, of any real type.

        Returns:
            int64 tensor `(batch,)` in [0, k) on the device of `timesteps`.

        Raises:
            ValueError: For a NaN timestep on a CPU; elsewhere it is not looked for.
        """
        _, cluster_edges = self._midpoints(timesteps.device)
        return _count_reached(cluster_edges, timesteps)

    def sample(
        self,
        batch_size: int,
        *,
        shares: Tensor | Sequence[float] | None = None,
        importance: Tensor | Sequence[float] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> Tensor:
        r"""Draw timesteps stratified over the clusters, in random order.

        Of B samples, a cluster of share $q_i$ gets $\lfloor B q_i \rfloor$ or $\lceil B q_i \rceil$, and $B q_i$ on
        average: one random offset u in [0, 1) puts sample m at the quantile (m + u) / B of the clusters (systematic
        resampling; Kitagawa 1996). Equal shares, the default, are not the uniform distribution where clusters differ
        in width: a loss divided by [`density`] keeps the expectation it has under uniform timesteps, one that is not
        counts every cluster alike. `shares=[len(cluster) for cluster in clusters]` draws uniform timesteps.

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
            ValueError: For an argument outside these ranges, a generator that is not on the CPU, or none with several
                processes.
        """
        COUNT.check(batch_size=batch_size, num_processes=num_processes)
        if not 0 <= process_index < num_processes:
            raise ValueError(f"`process_index` must be in [0, {num_processes}), got {process_index}.")
        _check_generator(generator, num_processes)
        shares, within = self._distribution(shares, importance)
        num_samples = batch_size * num_processes
        # Multiplied before it is divided, equal shares of a divisible batch end on integers to the bit.
        cumulative = shares.cumsum(0)
        ends = cumulative * num_samples / cumulative[-1]
        points = torch.arange(num_samples, device="cpu") + _random_fractions(1, generator)
        clusters = torch.bucketize(points, ends[:-1], right=True)
        indices = self._draw_within(clusters, within, generator)
        order = torch.randperm(num_samples, generator=generator, device="cpu")
        indices = indices[order[process_index * batch_size : (process_index + 1) * batch_size]]
        return _to_device(indices if self.timesteps is None else self._grid()[indices], device)

    def density(
        self,
        timesteps: Tensor,
        *,
        shares: Tensor | Sequence[float] | None = None,
        importance: Tensor | Sequence[float] | None = None,
    ) -> Tensor:
        r"""Density of [`sample`] relative to uniform timesteps: $T q_i a_t / \sum_{s \in i} a_s$ for importance a.

        Args:
            timesteps: `(batch,)`, as in [`assign`], with its errors.
            shares: What [`sample`] was called with, with its errors.
            importance: As `shares`.

        Returns:
            float32 tensor `(batch,)` on the device of `timesteps`; the mean over the training grid is 1.
        """
        midpoints, _ = self._midpoints(timesteps.device)
        shares, within = self._distribution(shares, importance)
        density = len(within) * (shares / shares.sum())[self._cluster_of_index()] * within
        return _to_device(density.float(), timesteps.device)[_count_reached(midpoints, timesteps)]

    def to_dict(self) -> dict[str, list]:
        """The clusters as a dictionary of JSON types, for [`from_dict`]."""
        grid = {} if self.timesteps is None else {"timesteps": list(self.timesteps)}
        return {"boundaries": list(self.boundaries), **grid}

    @classmethod
    def from_dict(cls, config: dict[str, list]) -> TimestepClusters:
        """Restore clusters from [`to_dict`]; a ValueError for other keys than its, and as the class."""
        if "boundaries" not in config or not config.keys() <= {"boundaries", "timesteps"}:
            raise ValueError(
                f"`config` must have the key 'boundaries' and may have 'timesteps', got {sorted(config)}."
            )
        return cls(**config)

    def _grid(self) -> Tensor:
        """The training timesteps, float32 `(T,)` on the CPU."""
        grid = range(self.num_train_timesteps) if self.timesteps is None else self.timesteps
        return torch.tensor(grid, dtype=torch.float32, device="cpu")

    def _midpoints(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Halfway marks between neighbours in the grid `(T - 1,)`, and those at which a cluster begins `(k - 1,)`.

        A timestep's nearest grid index is the number of marks that it reaches.
        """
        if device not in self._tables:
            grid = self._grid().double()
            midpoints = (grid[1:] + grid[:-1]) / 2
            cluster_edges = midpoints[[edge - 1 for edge in self.boundaries[1:-1]]]
            real = scalar_dtype(device)
            self._tables[device] = midpoints.to(device, real), cluster_edges.to(device, real)
        return self._tables[device]

    def _cluster_of_index(self) -> Tensor:
        """Cluster of each grid index, int64 `(T,)`."""
        widths = torch.tensor(self.boundaries, device="cpu").diff()
        return torch.arange(len(self), device="cpu").repeat_interleave(widths)

    def _distribution(
        self, shares: Tensor | Sequence[float] | None, importance: Tensor | Sequence[float] | None
    ) -> tuple[Tensor, Tensor]:
        """Relative shares `(k,)` of the clusters, and each timestep's probability `(T,)` given its cluster."""
        shares = _checked_weights("shares", shares, len(self))
        if not shares.sum() > 0:
            raise ValueError(f"`shares` must have a positive sum, got {shares.tolist()}.")
        importance = _checked_weights("importance", importance, self.num_train_timesteps)
        cluster_of_index = self._cluster_of_index()
        sums = importance.new_zeros(len(self)).index_add(0, cluster_of_index, importance)
        if not (sums > 0).all():
            empty = int((sums <= 0).nonzero()[0])
            raise ValueError(f"`importance` must have a positive sum in each cluster, got 0 in cluster {empty}.")
        return shares, importance / sums[cluster_of_index]

    def _draw_within(self, clusters: Tensor, within: Tensor, generator: torch.Generator | None) -> Tensor:
        """One grid index for each entry of `clusters`, by inverting the distribution function of its cluster."""
        edges, cluster_of_index = torch.tensor(self.boundaries, device="cpu"), self._cluster_of_index()
        cumulative = torch.nn.functional.pad(within.cumsum(0), (1, 0))
        starts, ends = (cumulative[edge[cluster_of_index]] for edge in (edges[:-1], edges[1:]))
        # Cluster i fills [i, i + 1] exactly, because x / x is 1.
        cumulative = cluster_of_index + (cumulative[1:] - starts) / (ends - starts)
        return torch.bucketize(clusters + _random_fractions(len(clusters), generator), cumulative, right=True)


def _random_fractions(count: int, generator: torch.Generator | None) -> Tensor:
    """Uniform in [0, 1), float64 `(count,)`."""
    return torch.randint(2**_FRACTION_BITS, (count,), generator=generator, device="cpu").double() / 2**_FRACTION_BITS


def _count_reached(marks: Tensor, timesteps: Tensor) -> Tensor:
    if timesteps.is_floating_point() and timesteps.device.type == "cpu" and timesteps.isnan().any():
        raise ValueError(f"`timesteps` must be numbers, got NaN at index {int(timesteps.isnan().nonzero()[0])}.")
    return torch.bucketize(timesteps.to(marks.dtype), marks, right=True)


def _to_device(tensor: Tensor, device: torch.device | str | None) -> Tensor:
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


def _checked_grid(timesteps: Sequence[float] | Tensor, num_timesteps: int) -> tuple[float, ...] | None:
    """The grid as float32 numbers, or None for 0, 1, ..., T - 1."""
    grid = torch.as_tensor(timesteps, dtype=torch.float32, device="cpu")
    if grid.shape != (num_timesteps,):
        raise ValueError(
            f"`timesteps` must hold one number for each of the {num_timesteps} timesteps of `boundaries`, "
            f"got shape {tuple(grid.shape)}."
        )
    if not (grid.isfinite().all() and (grid.diff() > 0).all()):
        raise ValueError("`timesteps` must be finite and strictly increasing, in ascending noise level.")
    return None if is_discrete(grid) else tuple(grid.tolist())


def _checked_weights(name: str, weights: Tensor | Sequence[float] | None, length: int) -> Tensor:
    """The weights as float64 `(length,)` on the CPU; ones by default."""
    if weights is None:
        return torch.ones(length, dtype=torch.float64, device="cpu")
    weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if weights.shape != (length,):
        raise ValueError(f"`{name}` must have the shape ({length},), got {tuple(weights.shape)}.")
    valid = weights.isfinite() & (weights >= 0)
    if not valid.all():
        index = int((~valid).nonzero()[0])
        raise ValueError(f"`{name}` must be finite and >= 0, got {float(weights[index])} at index {index}.")
    return weights


def _check_generator(generator: torch.Generator | None, num_processes: int) -> None:
    if generator is None and num_processes > 1:
        raise ValueError(
            f"`generator` must be given when {num_processes} processes share a batch: pass each of them a "
            "`torch.Generator` of the same seed."
        )
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"`generator` must be on the CPU, so that all devices draw alike, got {generator.device}.")
