"""Train or fine-tune a text-to-image model with Denoising Task Routing, whole or by LoRA.

Run with `accelerate launch train_text_to_image.py --help`; README.md beside this file has complete commands.
"""

from dataclasses import dataclass

import torch

from diffusers_dtr import training
from diffusers_dtr.training.config import CaptionedDataConfig, JSONConfig, LoraConfig, ModelConfig, TextConfig, option
from diffusers_dtr.training.families import (
    TEXT_TO_IMAGE_FAMILIES,
    denoiser_family,
    frozen_dtype,
    load_family_denoiser,
)
from diffusers_dtr.user_errors import run_script


@dataclass(frozen=True)
class DenoiserConfig(ModelConfig):
    """What is trained: the denoiser of a pretrained pipeline, or a new one in its place."""

    pretrained_model_name_or_path: str = option(
        help=f"A pipeline whose denoiser is diffusers' or ours: {', '.join(TEXT_TO_IMAGE_FAMILIES)}."
    )
    denoiser_config: JSONConfig = option(
        None,
        "Config of a new denoiser to train from scratch with the pipeline's other parts, as JSON or as a JSON file.",
    )


def parse_args(argv=None):
    parts = {"model": DenoiserConfig, "data": CaptionedDataConfig, "text": TextConfig, "lora": LoraConfig}
    return training.parse_config(argv, description=__doc__, **parts)


def main(config):
    accelerator = training.start_run(config)
    family = denoiser_family(config, TEXT_TO_IMAGE_FAMILIES)
    # What is not trained is in the precision of the run.
    dtype = frozen_dtype(accelerator)

    # 1. Captioned images, and the autoencoder in whose latent space they are learned
    images = training.load_images(config)
    vae = training.load_vae(config.model, dtype).to(accelerator.device)

    # 2. Denoiser and noise schedule
    noise_scheduler = training.load_noise_scheduler(config)
    torch.manual_seed(config.run.seed)
    config, model = load_family_denoiser(config, family, noise_scheduler, vae, dtype)

    # 3. What the denoiser is told of a caption, and how it is sampled
    data = training.load_data(config, images, model=model, vae=vae)
    pipeline = training.TextPipeline(config, family, model, data, accelerator)

    # 4. Train
    trainer = training.Trainer(
        model,
        data,
        config,
        pipeline=pipeline,
        noise_scheduler=noise_scheduler,
        accelerator=accelerator,
        project_name="text-to-image",
    )
    trainer.train()
    trainer.finish()


if __name__ == "__main__":
    run_script(main, parse_args())
