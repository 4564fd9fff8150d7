"""Task affinity between timesteps, and negative transfer from training on all of them."""

from .estimators import cosines, gram, reliability
from .frechet import frechet_distance
from .measurement import Workspace
from .negative_transfer import HeldOutClusterLosses, confidence_interval, negative_transfer_gap
from .task_affinity import TaskAffinity, load_task_affinity, noise_distance_correlation, noise_distances


__all__ = [
    "HeldOutClusterLosses",
    "TaskAffinity",
    "Workspace",
    "confidence_interval",
    "cosines",
    "frechet_distance",
    "gram",
    "load_task_affinity",
    "negative_transfer_gap",
    "noise_distance_correlation",
    "noise_distances",
    "reliability",
]
