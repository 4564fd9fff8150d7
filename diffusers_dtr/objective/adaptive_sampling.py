"""Adaptive timestep sampling: each cluster is drawn as often as a running estimate of its loss demands."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from ..noise_levels import scalar_dtype
from ..ranges import COUNT, Range
from .clusters import TimestepClusters


STATISTICS = ("mean", "second_moment", "variance")


@dataclass(eq=False, repr=False)
class AdaptiveTimestepSampler:
    r"""Draws timesteps with a density that follows the loss of their cluster.

    This is the loss-second-moment resampler of Improved DDPM (arXiv 2102.09672, Section 3.3) on clusters instead of
    single timesteps, so that the estimate settles within a few hundred steps, and with stratified draws.

    With the statistic $s_i$ of cluster i of width $w_i$, every timestep of that cluster has the density
    $d_i = f + (1 - f) s_i T / \sum_j w_j s_j$, where f is the floor: no timestep is ever drawn less than f times as
    often as uniformly, and no correcting weight $1 / d_i$ exceeds 1 / f. Until each cluster has been observed the
    density is 1.

    The statistic is of the losses handed to [`update`]: "mean", "second_moment" for $\sqrt{E[L^2]}$, which gives the
    corrected mean loss its least variance where draws are independent (Improved DDPM, Eq. 18), or
    "variance" for $\sqrt{E[L^2] - E[L]^2}$, which does so where every cluster gets many samples of a batch (Neyman
    1934). Where the batch gives a cluster one sample or none, rounding its share adds a variance that grows with the
    mean loss, which "variance" leaves out of account.

    Losses are summed where they lie; the host waits for the device only every `interval` updates.

    Args:
        clusters: The clusters of timesteps.
        statistic: "mean", "second_moment" or "variance".
        decay: What the past counts each time new losses enter the estimate, in [0, 1).
        floor: Least density relative to uniform timesteps, in (0, 1].
        interval: Number of updates after which their losses enter the estimate, >= 1.

    Raises:
        ValueError: For an argument outside these ranges.

    Example:
        >>> import torch
        >>> from diffusers_dtr.objective import AdaptiveTimestepSampler, TimestepClusters
        >>> clusters = TimestepClusters([0, 500, 1000])
        >>> sampler = AdaptiveTimestepSampler(clusters, statistic="mean", floor=0.2, interval=1)
        >>> sampler.update(torch.tensor([100, 900]), torch.tensor([1.0, 3.0]))
        >>> sampler.shares
        tensor([0.3000, 0.7000], dtype=torch.float64)
    """

    clusters: TimestepClusters
    _: KW_ONLY
    statistic: str = "second_moment"
    decay: float = 0.9
    floor: float = 0.1
    interval: int = 50

    def __post_init__(self):
        if self.statistic not in STATISTICS:
            raise ValueError(f"`statistic` must be one of {', '.join(STATISTICS)}, got {self.statistic!r}.")
        Range("[0, 1)").check(decay=self.decay)
        Range("(0, 1]").check(floor=self.floor)
        COUNT.check(interval=self.interval)
        # Number, sum and sum of squares of each cluster's losses, decayed; and of those that have not entered yet.
        # These tensors are replaced, never written to, so that a state dict may hold them.
        self._moments = torch.zeros(len(self.clusters), 3, dtype=torch.float64, device="cpu")
        self._pending = torch.zeros_like(self._moments)
        self._num_pending = 0

    @property
    def shares(self) -> Tensor:
        """Expected part of a batch in each cluster, float64 `(k,)` on the CPU, of sum 1."""
        widths = torch.tensor([len(cluster) for cluster in self.clusters], dtype=torch.float64, device="cpu")
        uniform = widths / widths.sum()
        fitted = uniform * self._statistic()
        # Zero losses everywhere prefer no cluster.
        fitted = fitted / fitted.sum() if fitted.sum() > 0 else uniform
        return self.floor * uniform + (1 - self.floor) * fitted

    def sample(self, batch_size: int, **options: Any) -> Tensor:
        """Draw `(batch_size,)` timesteps of the current density; options and errors as in the clusters' `sample`.

        Processes draw one global batch together if they were updated alike.
        """
        return self.clusters.sample(batch_size, shares=self.shares, **options)

    def density(self, timesteps: Tensor) -> Tensor:
        """Current density of these timesteps relative to uniform ones, as [`TimestepClusters.density`]."""
        return self.clusters.density(timesteps, shares=self.shares)

    def weights(self, timesteps: Tensor) -> Tensor:
        """Importance weights 1 / density for the losses of drawn timesteps, to be called before the next [`update`].

        float32 `(batch,)` on the device of `timesteps` `(batch,)`; their expectation over draws is 1.
        """
        return 1 / self.density(timesteps)

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Update the estimate with the losses `(batch,)` of the global batch, which `accelerator.gather` returns.

        They are those of single samples, not yet multiplied with [`weights`]. Losses that are infinite or NaN, from a
        step that mixed precision is going to skip, are not observed. A ValueError if the shapes differ.
        """
        if timesteps.ndim != 1 or timesteps.shape != losses.shape:
            raise ValueError(
                f"`timesteps` and `losses` must have the same shape (batch,), got {tuple(timesteps.shape)} and "
                f"{tuple(losses.shape)}."
            )
        real = scalar_dtype(losses.device)
        losses = losses.detach().to(real)
        observed = losses.isfinite()
        losses = losses.where(observed, 0)
        moments = torch.stack([observed.to(real), losses, losses.square()], dim=1)
        # A product rather than a scattered sum: its order of summation is the same on every process.
        clusters = torch.arange(len(self.clusters), device=losses.device)
        membership = (clusters[:, None] == self.clusters.assign(timesteps)).to(real)
        self._pending = self._pending.to(losses.device, real) + membership @ moments
        self._num_pending += 1
        if self._num_pending == self.interval:
            self._moments = self.decay * self._moments + self._pending.to("cpu", torch.float64)
            self._pending = torch.zeros_like(self._pending)
            self._num_pending = 0

    def state_dict(self) -> dict[str, Any]:
        """State for an exact resume, with tensors on the CPU."""
        return {
            "boundaries": list(self.clusters.boundaries),
            "moments": self._moments,
            "pending": self._pending.to("cpu", torch.float64),
            "num_pending": self._num_pending,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what [`state_dict`] returned; a ValueError for that of other clusters, or other keys."""
        expected = self.state_dict().keys()
        if state_dict.keys() != expected:
            raise ValueError(f"`state_dict` must have the keys {sorted(expected)}, got {sorted(state_dict)}.")
        if tuple(state_dict["boundaries"]) != self.clusters.boundaries:
            raise ValueError(
                f"`state_dict` must be of clusters with the boundaries {list(self.clusters.boundaries)}, "
                f"got {list(state_dict['boundaries'])}."
            )
        self._moments = state_dict["moments"].to("cpu", torch.float64)
        self._pending = state_dict["pending"].to("cpu", torch.float64)
        self._num_pending = int(state_dict["num_pending"])

    def _statistic(self) -> Tensor:
        """In units of the loss, `(k,)`; ones until all clusters are observed."""
        count, total, square = self._moments.unbind(dim=1)
        if not (count > 0).all():
            return torch.ones_like(count)
        mean, second_moment = total / count, square / count
        if self.statistic == "mean":
            return mean.clamp(min=0)
        if self.statistic == "second_moment":
            return second_moment.sqrt()
        return (second_moment - mean.square()).clamp(min=0).sqrt()
