"""Balancing: how clusters are weighed against each other. These balancings need no gradients of single clusters.

Every formula is affine in the samples' losses, each of which counts 1/B: the mean over processes is the value for the
global batch, however its samples are spread, and a cluster without samples adds nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ranges import COUNT


# Beyond, one of signal and noise is lost to float32; schedules that reach pure noise have infinite values.
_MAX_LOG_SNR = 20.0


@dataclass(frozen=True)
class ClusterLosses:
    """Losses of one process's batch, and the cluster and noise level that each sample belongs to.

    Attributes:
        per_sample: `(B,)`.
        clusters: int64 `(B,)` in [0, k).
        log_snr: `(B,)` in [−∞, ∞].
        num_clusters: k.
        outputs: The denoiser's output for each cluster, if it was called once for each; its row 0 alone means nothing
            where the cluster has no samples.
    """

    per_sample: Tensor
    clusters: Tensor
    log_snr: Tensor
    num_clusters: int
    outputs: Sequence[Tensor] | None = None

    @cached_property
    def contributions(self) -> Tensor:
        """What each cluster adds to the mean loss, `(k,)`: n_i·L_i / B for n_i samples of mean loss L_i."""
        return self._sums / len(self.per_sample)

    @cached_property
    def counts(self) -> Tensor:
        """Number of samples in each cluster, int64 `(k,)`."""
        return self._membership.sum(1)

    @cached_property
    def means(self) -> Tensor:
        """Mean loss of each cluster, `(k,)`; 0 where there are no samples."""
        return self._sums / self.counts.clamp(min=1)

    @cached_property
    def _membership(self) -> Tensor:
        return torch.arange(self.num_clusters, device=self.clusters.device)[:, None] == self.clusters

    @cached_property
    def _sums(self) -> Tensor:
        # Neither a scattered sum, whose order varies on a GPU, nor a product, which autocast rounds.
        return torch.where(self._membership, self.per_sample, 0).sum(1)


class Balancing(nn.Module, ABC):
    """Base of all balancings: a module from the losses of a batch to the scalar to minimise.

    A subclass defines `forward`, and `cluster_weights` if it has any to show. It may have parameters, which
    [`ClusteredLoss.parameter_groups`] gives to the optimizer: with several processes [`ClusteredLoss`] averages their
    gradients over them in the backward pass, so that they stay the same everywhere without `DistributedDataParallel`;
    inside it they are averaged twice, to the same result.

    Attributes:
        num_clusters: The number of clusters it is made for; None if any.
        compares_gradients: Whether the next loss needs the gradients of single clusters, which are cheaper to have
            of outputs by cluster: see [`ClusteredLoss.denoise`].
    """

    num_clusters: int | None = None
    compares_gradients: bool = False

    @abstractmethod
    def forward(self, losses: ClusterLosses) -> Tensor:
        """The loss of this process's batch, a scalar; its mean over processes is minimised."""

    def cluster_weights(self, log_snr: Tensor) -> Tensor:
        """Current weight of each cluster's losses, `(k,)` without gradient, for logging; 1 in the plain mean.

        `log_snr` is the natural logarithm of the SNR in the middle of each cluster, `(k,)`.
        """
        return torch.ones_like(log_snr)


class UniformBalancing(Balancing):
    """The mean over samples: every cluster counts as much as it has samples."""

    def forward(self, losses: ClusterLosses) -> Tensor:
        """See [`Balancing`]."""
        return losses.per_sample.mean()


class UncertaintyWeighting(Balancing):
    r"""Uncertainty weighting: a learned log variance $s_i$ for each cluster (Kendall et al., arXiv 1705.07115).

    The loss is $\sum_i \frac{1}{2} (e^{-s_i} c_i + s_i)$ with the contribution $c_i = n_i L_i / B$ of a cluster with
    $n_i$ of the B samples and mean loss $L_i$. For equal counts, $c_i = L_i / k$, this is the formula of the released
    code of ANT (arXiv 2306.00354). For unequal ones $s_i$ settles at $\log E[c_i]$, and every cluster's samples
    together count as much as any other's.

    Args:
        num_clusters: k.

    Attributes:
        log_variance: s, `(k,)`, zeros at first.
    """

    def __init__(self, num_clusters: int):
        super().__init__()
        self.num_clusters = num_clusters
        self.log_variance = nn.Parameter(torch.zeros(num_clusters))

    def forward(self, losses: ClusterLosses) -> Tensor:
        """See [`Balancing`]."""
        return 0.5 * ((-self.log_variance).exp() * losses.contributions + self.log_variance).sum()

    def cluster_weights(self, log_snr: Tensor) -> Tensor:
        """Half the inverse variances; see [`Balancing`]."""
        return 0.5 * (-self.log_variance.detach()).exp()


class ContinuousUncertainty(Balancing):
    r"""Uncertainty as a learned function u of the noise level: the mean of $L / e^u + u$ (EDM2, arXiv 2312.02696).

    u settles at the logarithm of the expected loss at each noise level, so that all levels count alike and nothing
    jumps at the edges of clusters. As in EDM2, u is linear in random Fourier features
    $\sqrt{2} \cos(2 \pi (f_j x + \phi_j))$, $f_j \sim N(0, 1)$, $\phi_j \sim U(0, 1)$, of EDM's noise conditioning
    $x = \frac{1}{4} \log \sigma = -\frac{1}{8} \log \mathrm{SNR}$. Unlike there, it starts from u = 0, which is the
    plain mean, and is the mean over the features instead of their sum over the root of their number: an Adam step of
    some learning rate then moves u about as far as it moves a cluster's log variance.

    Log SNRs are clamped to [−20, 20].

    Args:
        num_features: Number of Fourier features, >= 1; a ValueError otherwise.
        seed: Seed of their frequencies and phases.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, num_features: int = 128, *, seed: int = 0):
        super().__init__()
        COUNT.check(num_features=num_features)
        generator = torch.Generator("cpu").manual_seed(seed)
        self.register_buffer("frequencies", torch.randn(num_features, generator=generator, device="cpu"))
        self.register_buffer("phases", torch.rand(num_features, generator=generator, device="cpu"))
        self.weight = nn.Parameter(torch.zeros(num_features))

    def forward(self, losses: ClusterLosses) -> Tensor:
        """See [`Balancing`]."""
        u = self.log_uncertainty(losses.log_snr)
        return (losses.per_sample * (-u).exp() + u).mean()

    def cluster_weights(self, log_snr: Tensor) -> Tensor:
        """The inverse uncertainties in the middle of the clusters; see [`Balancing`]."""
        return (-self.log_uncertainty(log_snr).detach()).exp()

    def log_uncertainty(self, log_snr: Tensor) -> Tensor:
        """The learned function u of natural logarithms of the SNR, in any shape."""
        noise_level = -log_snr.clamp(-_MAX_LOG_SNR, _MAX_LOG_SNR).to(self.weight.dtype) / 8
        angles = 2 * math.pi * (noise_level[..., None] * self.frequencies + self.phases)
        return (math.sqrt(2) * angles.cos() * self.weight).mean(-1)


BALANCINGS: Mapping[str, Callable[[int], Balancing]] = {
    "uniform": lambda num_clusters: UniformBalancing(),
    "uncertainty": UncertaintyWeighting,
    "continuous_uncertainty": lambda num_clusters: ContinuousUncertainty(),
}


def num_processes() -> int:
    """How many processes train together; 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def balance(balancing: Balancing, losses: ClusterLosses) -> Tensor:
    """The scalar to minimise, with the gradients of the balancing's parameters averaged over processes."""
    if num_processes() == 1:
        return balancing(losses)
    averaged = {name: _AverageGradient.apply(parameter) for name, parameter in balancing.named_parameters()}
    return torch.func.functional_call(balancing, averaged, (losses,))


class _AverageGradient(torch.autograd.Function):
    # Its backward runs before any of the denoiser's, which comes earlier in the graph: all processes call their
    # collectives, these and DistributedDataParallel's, in the same order.

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / dist.get_world_size()
