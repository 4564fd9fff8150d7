"""Denoising Task Routing and clustered, balanced timesteps for 🤗 diffusers."""

# diffusers looks for the base class of a component in the namespace of the component's library.
from diffusers import ModelMixin

from .analysis import TaskAffinity
from .diffusers_registration import register_library, register_pipeline
from .latents import decode_latents, encode_images, vae_scale_factor
from .lora_files import load_routed_lora, save_routed_lora
from .models.adapters import route_adapter, unroute_adapter
from .models.dit import DTRTransformer2DModel
from .models.families import TRANSFORMERS, UNETS, routed_class
from .models.family import Family
from .models.lora_header import mark_routed
from .models.presets import DIT_PRESETS
from .models.route import route, unroute
from .models.routed_blocks import Stream
from .models.transformer import RoutedTransformerMixin
from .noise_levels import NoiseLevels
from .objective.adaptive_sampling import AdaptiveTimestepSampler
from .objective.clustered_loss import ClusteredLoss
from .objective.clustering import cluster_timesteps
from .objective.clusters import TimestepClusters
from .objective.denoising_loss import DenoisingLoss
from .objective.gradient_balancing import GradientBalancer
from .pipelines.pipeline_dtr import DTRPipeline
from .routing import random_routing_mask, routing_mask


__version__ = "0.1.0"

_DECLARED = {f"DTR{name}": name for name in (*TRANSFORMERS, *UNETS)}

__all__ = [
    "DIT_PRESETS",
    "AdaptiveTimestepSampler",
    "ClusteredLoss",
    "DTRPipeline",
    "DTRTransformer2DModel",
    "DTRUNet2DConditionModel",
    "DTRUNet2DModel",
    "DenoisingLoss",
    "Family",
    "GradientBalancer",
    "ModelMixin",
    "NoiseLevels",
    "RoutedTransformerMixin",
    "Stream",
    "TaskAffinity",
    "TimestepClusters",
    "cluster_timesteps",
    "decode_latents",
    "encode_images",
    "load_routed_lora",
    "mark_routed",
    "random_routing_mask",
    "route",
    "route_adapter",
    "routing_mask",
    "save_routed_lora",
    "unroute",
    "unroute_adapter",
    "vae_scale_factor",
]


def __getattr__(name: str) -> type[ModelMixin]:
    """Routed classes, made when they are first asked for, so that no model is imported that nobody uses."""
    if name not in _DECLARED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, routed_class(_DECLARED[name]))


def __dir__() -> list[str]:
    return sorted({*globals(), *_DECLARED})


register_library()
register_pipeline(DTRPipeline)
