"""Train or fine-tune a text-to-video model with Denoising Task Routing, whole or by LoRA.

Run with `accelerate launch train_text_to_video.py --help`; README.md beside this file has complete commands.
"""

from dataclasses import dataclass

import torch

from diffusers_dtr import training
from diffusers_dtr.training.config import LoraConfig, ModelConfig, TextConfig, VideoConfig, option
from diffusers_dtr.training.families import (
    TEXT_TO_VIDEO_FAMILIES,
    denoiser_family,
    frozen_dtype,
    load_family_denoiser,
)
from diffusers_dtr.user_errors import run_script


@dataclass(frozen=True)
class DenoiserConfig(ModelConfig):
    """What is trained: the denoiser of a pretrained pipeline."""

    pretrained_model_name_or_path: str = option(
        help=f"A pipeline whose denoiser is diffusers' or ours: {', '.join(TEXT_TO_VIDEO_FAMILIES)}."
    )


def parse_args(argv=None):
    parts = {"model": DenoiserConfig, "data": VideoConfig, "text": TextConfig}
    return training.parse_config(argv, description=__doc__, **parts, lora=LoraConfig)


def main(config):
    accelerator = training.start_run(config)
    family = denoiser_family(config, TEXT_TO_VIDEO_FAMILIES)
    # What is not trained is in the precision of the run.
    dtype = frozen_dtype(accelerator)

    # 1. Captioned clips, and the autoencoder in whose latent space they are learned
    vae = training.load_vae(config.model, dtype).to(accelerator.device)

    data = training.load_data(config, vae=vae)

    # 2. Denoiser and noise schedule
    noise_scheduler = training.load_noise_scheduler(config)
    torch.manual_seed(config.run.seed)
    config, model = load_family_denoiser(config, family, noise_scheduler, vae, dtype)

    # 3. What the denoiser is told of a caption, and how it is sampled
    pipeline = training.TextPipeline(config, family, model, data, accelerator)

    # 4. Train
    trainer = training.Trainer(
        model,
        data,
        config,
        pipeline=pipeline,
        noise_scheduler=noise_scheduler,
        accelerator=accelerator,
        project_name="text-to-video",
    )
    trainer.train()
    trainer.finish()


if __name__ == "__main__":
    run_script(main, parse_args())
