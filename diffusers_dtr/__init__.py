"""Denoising Task Routing and clustered, balanced timesteps for 🤗 diffusers."""

# diffusers looks for the base class of a component in the namespace of the component's library.
from diffusers import ModelMixin

from .diffusers_registration import register_library
from .models.convert_original_dit import convert_original_dit
from .models.presets import DIT_PRESETS
from .models.transformer_dit import DTRTransformer2DModel
from .routing import random_routing_mask, routing_mask


__version__ = "0.1.0"

__all__ = [
    "DIT_PRESETS",
    "DTRTransformer2DModel",
    "ModelMixin",
    "convert_original_dit",
    "random_routing_mask",
    "routing_mask",
]

register_library()
