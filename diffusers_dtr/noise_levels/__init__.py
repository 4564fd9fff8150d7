"""Noise levels: the forward process a diffusers scheduler trains with. The only place that knows scheduler classes."""

from .forward_processes import uses_learned_variance
from .levels import NoiseLevels


__all__ = ["NoiseLevels", "uses_learned_variance"]
