"""Families of text-conditional denoisers that can be trained: declarations, and the parts of their pipelines."""

from .base import DenoiserFamily
from .parts import denoiser_family, frozen_dtype, load_family_denoiser
from .text_to_image import TEXT_TO_IMAGE_FAMILIES
from .text_to_video import TEXT_TO_VIDEO_FAMILIES


__all__ = [
    "TEXT_TO_IMAGE_FAMILIES",
    "TEXT_TO_VIDEO_FAMILIES",
    "DenoiserFamily",
    "denoiser_family",
    "frozen_dtype",
    "load_family_denoiser",
]
