"""Whether timesteps get along: the affinity of their gradients."""

from .noise_distance import noise_distance_correlation, noise_distances
from .task_affinity import TaskAffinity, load_task_affinity


__all__ = ["TaskAffinity", "load_task_affinity", "noise_distance_correlation", "noise_distances"]
