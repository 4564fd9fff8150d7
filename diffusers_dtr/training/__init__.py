"""What training scripts share: data, arguments, checkpoints, validation."""

from .arguments import (
    add_data_arguments,
    add_noise_arguments,
    add_objective_arguments,
    add_optimization_arguments,
    add_pretrained_arguments,
    add_routing_arguments,
    add_run_arguments,
    check_arguments,
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
    load_noise_scheduler,
    load_vae,
    pretrained_component,
    pretrained_options,
    sampling_scheduler,
)
from .ema import averaged_weights, build_ema
from .loss_history import LossHistory
from .loss_monitor import LossMonitor
from .objective import Objective, build_objective
from .optimizer import build_lr_scheduler, build_optimizer
from .outputs import prepare_output_dir, save_pipeline, save_record
from .randomness import derive_seed, noise_generator, seed_model, timestep_generator
from .record import run_record, tracker_config
from .run import start_run
from .tracking import log_image
from .trainer import Trainer
from .validation import HeldOutLoss, HeldOutLosses, save_sample_grid


__all__ = [
    "CaptionedDataset",
    "Captions",
    "Checkpoints",
    "HeldOutLoss",
    "HeldOutLosses",
    "LossHistory",
    "LossMonitor",
    "Objective",
    "Trainer",
    "UnreadableImages",
    "add_data_arguments",
    "add_noise_arguments",
    "add_objective_arguments",
    "add_optimization_arguments",
    "add_pretrained_arguments",
    "add_routing_arguments",
    "add_run_arguments",
    "averaged_weights",
    "build_dataset",
    "build_ema",
    "build_loader",
    "build_lr_scheduler",
    "build_objective",
    "build_optimizer",
    "check_arguments",
    "check_pretrained_denoiser",
    "clean_samples",
    "derive_seed",
    "held_out_dataset",
    "held_out_samples",
    "json_config",
    "load_images",
    "load_noise_scheduler",
    "load_vae",
    "log_image",
    "noise_config",
    "noise_generator",
    "prepare_output_dir",
    "pretrained_component",
    "pretrained_options",
    "routing_config",
    "run_record",
    "sampling_scheduler",
    "save_pipeline",
    "save_record",
    "save_sample_grid",
    "seed_model",
    "start_run",
    "timestep_generator",
    "tracker_config",
    "warmed_up_beta",
]
