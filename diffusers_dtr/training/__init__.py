"""What training scripts share: data, arguments, checkpoints, validation."""

from .argument_checks import check_arguments
from .arguments import (
    add_data_arguments,
    add_noise_arguments,
    add_objective_arguments,
    add_optimization_arguments,
    add_pretrained_arguments,
    add_routing_arguments,
    add_run_arguments,
    json_config,
)
from .captions import CaptionedDataset
from .classes import match_classes
from .clean_samples import build_dataset, build_loader, held_out_dataset, held_out_samples, load_images
from .components import (
    check_new_denoiser,
    check_pretrained_denoiser,
    denoiser_config,
    denoiser_routing,
    image_channels,
    load_vae,
    sample_size,
)
from .families import DenoiserFamily
from .lora import add_lora, save_lora
from .noise_schedule import load_noise_scheduler, sampling_scheduler
from .outputs import save_pipeline
from .pretrained import (
    pretrained_class_names,
    pretrained_config,
    pretrained_denoiser,
    pretrained_options,
    pretrained_pipeline_class,
)
from .run import start_run
from .text_to_image import (
    build_text_encoder,
    frozen_dtype,
    load_text_to_image_pipeline,
    sample_text_to_image,
    sampling_arguments,
    text_to_image_family,
)
from .text_to_image_arguments import (
    add_guidance_arguments,
    add_lora_arguments,
    add_text_arguments,
    check_text_to_image_arguments,
)
from .text_to_image_families import TEXT_TO_IMAGE_FAMILIES
from .text_to_video import add_video_arguments, text_to_video_family, video_dataset
from .text_to_video_families import TEXT_TO_VIDEO_FAMILIES
from .trainer import Trainer
from .validation import HeldOutLoss


__all__ = [
    "TEXT_TO_IMAGE_FAMILIES",
    "TEXT_TO_VIDEO_FAMILIES",
    "CaptionedDataset",
    "DenoiserFamily",
    "HeldOutLoss",
    "Trainer",
    "add_data_arguments",
    "add_guidance_arguments",
    "add_lora",
    "add_lora_arguments",
    "add_noise_arguments",
    "add_objective_arguments",
    "add_optimization_arguments",
    "add_pretrained_arguments",
    "add_routing_arguments",
    "add_run_arguments",
    "add_text_arguments",
    "add_video_arguments",
    "build_dataset",
    "build_loader",
    "build_text_encoder",
    "check_arguments",
    "check_new_denoiser",
    "check_pretrained_denoiser",
    "check_text_to_image_arguments",
    "denoiser_config",
    "denoiser_routing",
    "frozen_dtype",
    "held_out_dataset",
    "held_out_samples",
    "image_channels",
    "json_config",
    "load_images",
    "load_noise_scheduler",
    "load_text_to_image_pipeline",
    "load_vae",
    "match_classes",
    "pretrained_class_names",
    "pretrained_config",
    "pretrained_denoiser",
    "pretrained_options",
    "pretrained_pipeline_class",
    "sample_size",
    "sample_text_to_image",
    "sampling_arguments",
    "sampling_scheduler",
    "save_lora",
    "save_pipeline",
    "start_run",
    "text_to_image_family",
    "text_to_video_family",
    "video_dataset",
]
