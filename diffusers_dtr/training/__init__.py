"""Training: `Trainer(model, data, config)`, and what the example scripts build these of."""

from .components import load_denoiser, load_vae, resolve_resolution
from .config import TrainingConfig, parse_config
from .data import TrainingData, load_data, load_images, match_pretrained_classes
from .noise_schedule import load_noise_scheduler
from .pipelines import TextPipeline, load_text_encoding
from .run.start import start_run
from .trainer import Trainer
from .validation import HeldOutLoss


__all__ = [
    "HeldOutLoss",
    "TextPipeline",
    "Trainer",
    "TrainingConfig",
    "TrainingData",
    "load_data",
    "load_denoiser",
    "load_images",
    "load_noise_scheduler",
    "load_text_encoding",
    "load_vae",
    "match_pretrained_classes",
    "parse_config",
    "resolve_resolution",
    "start_run",
]
