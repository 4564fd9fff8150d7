"""Negative transfer: what training on all timesteps does to the timesteps of one cluster.

A model trained on all timesteps is compared with specialists, each trained with the same budget on one cluster alone
(Addressing Negative Transfer in Diffusion Models, ANT, arXiv 2306.00354, Section 3, observation O2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device, slice_tensors
from torch import Tensor, nn

from ..evaluating import evaluating
from ..extras import require
from ..objective.clusters import TimestepClusters
from ..objective.denoising_loss import DenoisingLoss
from ..ranges import COUNT, Range
from .timestep_gradients import checked_conditions


@dataclass(eq=False)
class HeldOutClusterLosses:
    """Denoising loss within one cluster of timesteps, on the same images, noise and timesteps for every model.

    The samples of a cluster are drawn from the seed and the cluster's number alone, so that the losses of two models
    can be compared sample by sample, with much less noise than in either loss. The model is called in eval mode, as by
    [`DenoisingLoss.of_model`].

    Args:
        loss_fn: The loss, of the scheduler that the models were trained with. Of a learned variance, the squared error
            of the prediction alone counts.
        clusters: Clusters of timesteps.
        clean: Held-out clean samples `(N, C, ...)`, on any device.
        conditions: What else the models are called with, by argument name: tensors `(N, ...)`, or mappings of these.
        num_samples: Samples per cluster. Clean samples take turns, each with new noise and a new timestep.
        seed: Seed of noise and timesteps, >= 0.
        batch_size: Samples per forward call.

    Raises:
        ValueError: For clusters of another schedule, conditions of another length, or numbers out of range.

    Example:
        >>> import torch
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> from diffusers_dtr import DenoisingLoss, cluster_timesteps
        >>> from diffusers_dtr.analysis import HeldOutClusterLosses
        >>> scheduler = DDPMScheduler()
        >>> joint, specialist = (
        ...     UNet2DModel(8, block_out_channels=(8, 8), norm_num_groups=4,
        ...         down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        ...     for _ in range(2)
        ... )
        >>> clusters = cluster_timesteps(scheduler, num_clusters=4, cost="snr")
        >>> losses = HeldOutClusterLosses(DenoisingLoss(scheduler), clusters, torch.zeros(16, 3, 8, 8), num_samples=64)
        >>> gaps = losses(specialist, 3) - losses(joint, 3)  # one per sample; below 0 is negative transfer
        >>> gaps.shape
        torch.Size([64])
    """

    loss_fn: DenoisingLoss
    clusters: TimestepClusters
    clean: Tensor
    conditions: Mapping[str, Any] | None = None
    _: KW_ONLY
    num_samples: int = 2048
    seed: int = 0
    batch_size: int = 256

    def __post_init__(self):
        num_timesteps = self.loss_fn.levels.num_train_timesteps
        if self.clusters.num_train_timesteps != num_timesteps:
            raise ValueError(
                f"`clusters` must be of the {num_timesteps} timesteps of `loss_fn`, got clusters of "
                f"{self.clusters.num_train_timesteps}."
            )
        COUNT.check(num_samples=self.num_samples, batch_size=self.batch_size, **{"len(clean)": len(self.clean)})
        self.conditions = checked_conditions(self.conditions, len(self.clean))

    @torch.no_grad()
    def __call__(self, model: nn.Module, cluster: int) -> Tensor:
        """The losses of a model, evaluated where it is: float64 `(num_samples,)` on the CPU.

        Args:
            model: The denoiser.
            cluster: Number of a cluster, in [0, k).

        Raises:
            ValueError: If there is no such cluster, or as [`DenoisingLoss`].
        """
        if not 0 <= cluster < len(self.clusters):
            raise ValueError(f"`cluster` must be in [0, {len(self.clusters)}), got {cluster}.")
        device = next(model.parameters()).device
        shares = [float(number == cluster) for number in range(len(self.clusters))]
        # Another number for every seed and cluster
        generator = torch.Generator().manual_seed(self.seed * len(self.clusters) + cluster)
        timesteps = self.clusters.sample(self.num_samples, shares=shares, generator=generator)
        losses = []
        with evaluating(model):
            for places in torch.arange(self.num_samples).split(self.batch_size):
                rows = places % len(self.clean)
                # One by one, so that noise does not depend on the number of samples in a forward call
                noise = torch.stack([torch.randn(self.clean.shape[1:], generator=generator) for _ in rows])
                clean, conditions = slice_tensors((self.clean, self.conditions), rows)
                batch = send_to_device((clean, noise, timesteps[places], conditions), device)
                losses.append(self.loss_fn.of_model(model, *batch).mse)
        return torch.cat(losses).double().cpu()


def negative_transfer_gap(specialist: Tensor, joint: Tensor, *, relative: bool = False) -> Tensor:
    """The negative transfer gap of ANT, in float64: a metric of the specialist in its cluster less the joint model's.

    The metric is one of which less is better, as a held-out loss or a Fréchet distance. Below zero there is negative
    transfer: training on the other timesteps too made the joint model worse in this cluster. Above zero, it gained.

    Args:
        specialist: The metric, of any shape, where the cluster's timesteps are the specialist's.
        joint: The metric where they are the joint model's, of a shape that broadcasts with it.
        relative: Divide by the joint model's metric, for clusters whose losses differ by orders of magnitude.
    """
    specialist, joint = specialist.double(), joint.double()
    gap = specialist - joint
    return gap / joint if relative else gap


def confidence_interval(values: Tensor, confidence: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, lower and upper end, float64 `(...)`, of a confidence interval by Student's t distribution.

    Exact for independent, normally distributed values. Few values have wide intervals: the half-width at 95 % is 9.0
    standard deviations of two values, 2.5 of three and 1.2 of five.

    Args:
        values: `(n, ...)`, n >= 2: one entry for each seed.
        confidence: Share of such intervals that hold the expectation, in (0, 1).

    Raises:
        ImportError: Without SciPy.
        ValueError: For fewer than two values or a share out of range.
    """
    require("scipy", "analysis", "Confidence intervals")
    from scipy import stats

    if values.ndim == 0 or len(values) < 2:
        raise ValueError(
            f"`values` must have at least two entries, to estimate a spread, got shape {tuple(values.shape)}."
        )
    Range("(0, 1)").check(confidence=confidence)
    values = values.double()
    mean = values.mean(0)
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(0) / math.sqrt(len(values))
    return mean, mean - half, mean + half
