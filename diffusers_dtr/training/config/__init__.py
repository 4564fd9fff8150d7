"""Typed configuration of a run: frozen dataclasses, whose fields are the flags of the training scripts."""

from .data import (
    CaptionedDataConfig,
    DataConfig,
    JSONConfig,
    LabelledDataConfig,
    LoraConfig,
    ModelConfig,
    SourceConfig,
    TextConfig,
    VideoConfig,
    check_one_source,
)
from .learning import EMAConfig, NoiseConfig, ObjectiveConfig, OptimizerConfig, RoutingConfig
from .options import BelowOne, option
from .running import GuidedValidationConfig, HubConfig, RunConfig, ValidationConfig
from .training_config import TrainingConfig, parse_config


__all__ = [
    "BelowOne",
    "CaptionedDataConfig",
    "DataConfig",
    "EMAConfig",
    "GuidedValidationConfig",
    "HubConfig",
    "JSONConfig",
    "LabelledDataConfig",
    "LoraConfig",
    "ModelConfig",
    "NoiseConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RoutingConfig",
    "RunConfig",
    "SourceConfig",
    "TextConfig",
    "TrainingConfig",
    "ValidationConfig",
    "VideoConfig",
    "check_one_source",
    "option",
    "parse_config",
]
