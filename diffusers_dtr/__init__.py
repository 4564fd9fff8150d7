"""Denoising Task Routing and clustered, balanced timesteps for 🤗 diffusers."""

# diffusers looks for the base class of a component in the namespace of the component's library.
from diffusers import ModelMixin

from .analysis import TaskAffinity
from .diffusers_registration import (
    register_library,
    register_pipeline,
    register_routed_model,
)
from .latents import decode_latents, encode_images, vae_scale_factor
from .models.convert_original_dit import convert_original_dit, original_dit_state_dict
from .models.original_checkpoint import load_original_checkpoint
from .models.presets import DIT_PRESETS
from .models.transformer_dit import DTRTransformer2DModel
from .models.transformer_flux import DTRFluxTransformer2DModel
from .models.transformer_pixart import DTRPixArtTransformer2DModel
from .models.transformer_sd3 import DTRSD3Transformer2DModel
from .models.unet_2d import DTRUNet2DModel
from .models.unet_2d_condition import DTRUNet2DConditionModel
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

__all__ = [
    "DIT_PRESETS",
    "AdaptiveTimestepSampler",
    "ClusteredLoss",
    "DTRFluxTransformer2DModel",
    "DTRPipeline",
    "DTRPixArtTransformer2DModel",
    "DTRSD3Transformer2DModel",
    "DTRTransformer2DModel",
    "DTRUNet2DConditionModel",
    "DTRUNet2DModel",
    "DenoisingLoss",
    "GradientBalancer",
    "ModelMixin",
    "NoiseLevels",
    "TaskAffinity",
    "TimestepClusters",
    "cluster_timesteps",
    "convert_original_dit",
    "decode_latents",
    "encode_images",
    "load_original_checkpoint",
    "original_dit_state_dict",
    "random_routing_mask",
    "routing_mask",
    "vae_scale_factor",
]

register_library()
register_pipeline(DTRPipeline)
for _model_class in (
    DTRFluxTransformer2DModel,
    DTRPixArtTransformer2DModel,
    DTRSD3Transformer2DModel,
    DTRUNet2DConditionModel,
):
    register_routed_model(_model_class)
