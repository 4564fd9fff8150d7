"""Clusters of timesteps: contiguous ranges that tile the training grid, from which timesteps are drawn.

ANT (Addressing Negative Transfer in Diffusion Models, arXiv 2306.00354) balances them as the tasks of a multi-task
problem.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from ..noise_levels import is_discrete, scalar_dtype
from .timestep_sampling import draw_stratified, stratified_density


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
    _tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, compare=False
    )

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

    def assign(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Assign timesteps to clusters, without waiting for the device.

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
        """Draw timesteps stratified over the clusters, in random order.

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
            ValueError: For an argument outside these ranges, a generator that is not on the CPU, or none with several
                processes.
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
        """Density of [`sample`] at these timesteps, relative to uniform ones; 1 everywhere for equal clusters.

        A loss divided by it has the expectation it would have under uniform timesteps.

        Args:
            timesteps: `(batch,)`, as in [`assign`].
            shares: What [`sample`] was called with.
            importance: What [`sample`] was called with.

        Returns:
            float32 tensor `(batch,)` on the device of `timesteps`.

        Raises:
            ValueError: As [`sample`] and [`assign`].
        """
        midpoints, _ = self._midpoints(timesteps.device)
        density = stratified_density(self.boundaries, shares=shares, importance=importance).float()
        return _to_device(density, timesteps.device)[_count_reached(midpoints, timesteps)]

    def to_dict(self) -> dict[str, list]:
        """The clusters as a dictionary of JSON types, for [`from_dict`]."""
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
            real = scalar_dtype(device)
            self._tables[device] = midpoints.to(device, real), cluster_edges.to(device, real)
        return self._tables[device]


def _count_reached(marks: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    if timesteps.is_floating_point() and timesteps.device.type == "cpu" and timesteps.isnan().any():
        raise ValueError(f"`timesteps` must be numbers, got NaN at index {int(timesteps.isnan().nonzero()[0])}.")
    return torch.bucketize(timesteps.to(marks.dtype), marks, right=True)


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
    return None if is_discrete(grid) else tuple(grid.tolist())
