"""Training objectives over noise levels: weighting, clusters of timesteps, balancing.

Extend them by a function as `weighting` or as the `cost` of clusters, or by a subclass of [`Balancing`].
"""

from .adaptive_sampling import AdaptiveTimestepSampler
from .balancing import (
    BALANCINGS,
    Balancing,
    ClusterLosses,
    ContinuousUncertainty,
    UncertaintyWeighting,
    UniformBalancing,
)
from .clustered_loss import ClusteredLoss
from .clustering import cluster_timesteps
from .clusters import TimestepClusters
from .denoising_loss import DenoisingLoss
from .gradient_balancing import GradientBalancer
from .weighting import P2, WEIGHTINGS, LogitNormal, MinSNR, SoftMinSNR


__all__ = [
    "BALANCINGS",
    "P2",
    "WEIGHTINGS",
    "AdaptiveTimestepSampler",
    "Balancing",
    "ClusterLosses",
    "ClusteredLoss",
    "ContinuousUncertainty",
    "DenoisingLoss",
    "GradientBalancer",
    "LogitNormal",
    "MinSNR",
    "SoftMinSNR",
    "TimestepClusters",
    "UncertaintyWeighting",
    "UniformBalancing",
    "cluster_timesteps",
]
