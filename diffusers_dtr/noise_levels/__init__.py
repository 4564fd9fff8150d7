"""Noise levels: the forward process a diffusers scheduler trains with. Only this part knows scheduler classes."""

from .forward_processes import uses_learned_variance
from .levels import NoiseLevels
from .timestep_table import is_discrete, sample_dtype, scalar_dtype


__all__ = ["NoiseLevels", "is_discrete", "sample_dtype", "scalar_dtype", "uses_learned_variance"]
