"""What training scripts share: data, arguments, checkpoints, validation."""

from .argument_checks import check_arguments, check_text_to_image_arguments
from .arguments import (
    add_data_arguments,
    add_lora_arguments,
    add_noise_arguments,
    add_objective_arguments,
    add_optimization_arguments,
    add_pretrained_arguments,
    add_routing_arguments,
    add_run_arguments,
    add_text_arguments,
    json_config,
    noise_config,
    routing_config,
    warmed_up_beta,
)
from .captions import CaptionedDataset, Captions
from .checkpoints import Checkpoints
from .clean_samples import (
    UnreadableImages,
    build_dataset,
    build_loader,
    clean_samples,
    held_out_dataset,
    held_out_samples,
    load_images,
)
from .components import (
    check_pretrained_denoiser,
    image_channels,
    load_noise_scheduler,
    load_vae,
    pretrained_component,
    pretrained_options,
    sampling_scheduler,
)
from .ema import averaged_weights, build_ema
from .lora import add_lora, save_lora
from .loss_history import LossHistory
from .loss_monitor import LossMonitor
from .objective import Objective, build_objective
from .optimizer import build_lr_scheduler, build_optimizer
from .outputs import prepare_output_dir, save_pipeline, save_record
from .randomness import derive_seed, noise_generator, seed_model, timestep_generator
from .record import run_record, tracker_config
from .run import start_run
from .text_embeddings import CachedTextEmbeddings, cache_text_embeddings
from .text_to_image import (
    TEXT_TO_IMAGE_FAMILIES,
    TextToImageFamily,
    build_text_encoder,
    frozen_dtype,
    load_text_to_image_pipeline,
    sample_text_to_image,
    text_to_image_family,
)
from .tracking import log_image
from .trainer import Trainer
from .validation import HeldOutLoss, HeldOutLosses, save_sample_grid


__all__ = [
    "TEXT_TO_IMAGE_FAMILIES",
    "CachedTextEmbeddings",
    "CaptionedDataset",
    "Captions",
    "Checkpoints",
    "HeldOutLoss",
    "HeldOutLosses",
    "LossHistory",
    "LossMonitor",
    "Objective",
    "TextToImageFamily",
    "Trainer",
    "UnreadableImages",
    "add_data_arguments",
    "add_lora",
    "add_lora_arguments",
    "add_noise_arguments",
    "add_objective_arguments",
    "add_optimization_arguments",
    "add_pretrained_arguments",
    "add_routing_arguments",
    "add_run_arguments",
    "add_text_arguments",
    "averaged_weights",
    "build_dataset",
    "build_ema",
    "build_loader",
    "build_lr_scheduler",
    "build_objective",
    "build_optimizer",
    "build_text_encoder",
    "cache_text_embeddings",
    "check_arguments",
    "check_pretrained_denoiser",
    "check_text_to_image_arguments",
    "clean_samples",
    "derive_seed",
    "frozen_dtype",
    "held_out_dataset",
    "held_out_samples",
    "image_channels",
    "json_config",
    "load_images",
    "load_noise_scheduler",
    "load_text_to_image_pipeline",
    "load_vae",
    "log_image",
    "noise_config",
    "noise_generator",
    "prepare_output_dir",
    "pretrained_component",
    "pretrained_options",
    "routing_config",
    "run_record",
    "sample_text_to_image",
    "sampling_scheduler",
    "save_lora",
    "save_pipeline",
    "save_record",
    "save_sample_grid",
    "seed_model",
    "start_run",
    "text_to_image_family",
    "timestep_generator",
    "tracker_config",
    "warmed_up_beta",
]
