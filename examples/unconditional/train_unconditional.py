"""Train or fine-tune an unconditional U-Net or diffusion transformer with Denoising Task Routing.

Run with `accelerate launch train_unconditional.py --help`; README.md beside this file has complete commands.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from diffusers_dtr import DIT_PRESETS, DTRTransformer2DModel, DTRUNet2DModel, training
from diffusers_dtr.training.config import JSONConfig, ModelConfig, ValidationConfig, check_one_source, option
from diffusers_dtr.user_errors import run_script


# What pipelines call each kind of denoiser.
MODELS = {"unet": DTRUNet2DModel, "transformer": DTRTransformer2DModel}


@dataclass(frozen=True)
class DenoiserConfig(ModelConfig):
    """What is trained: a new denoiser, or a pretrained one."""

    unet_config: JSONConfig = option(
        None, "Config of DTRUNet2DModel to train from scratch, as JSON or as a JSON file."
    )
    transformer_config: JSONConfig = option(
        None, "Config of DTRTransformer2DModel to train from scratch, as JSON or as a JSON file."
    )
    model_preset: Literal[tuple(DIT_PRESETS)] | None = option(None, "Published transformer to train from scratch.")

    def __post_init__(self):
        super().__post_init__()
        sources = ("unet_config", "transformer_config", "model_preset", "pretrained_model_name_or_path")
        check_one_source(self, *sources)


def parse_args(argv=None):
    parts = {"model": DenoiserConfig, "validation": ValidationConfig}
    return training.parse_config(argv, description=__doc__, **parts)


def new_denoiser(options):
    """What pipelines call it, its config, and values that follow from there being no labels; None if pretrained."""
    if options.pretrained_model_name_or_path is not None:
        return None, {}
    if options.unet_config is not None:
        return ("unet", options.unet_config), {}
    # The presets are made for latents; pixels have three channels.
    preset = {} if options.model_preset is None else {**DIT_PRESETS[options.model_preset], "in_channels": 3}
    unlabelled = {"num_embeds_ada_norm": None, "class_dropout_prob": 0.0}
    return ("transformer", options.transformer_config or preset), unlabelled


def main(config):
    accelerator = training.start_run(config)

    # 1. Images, and the autoencoder in whose latent space they are learned, if there is one
    images = training.load_images(config)
    vae = training.load_vae(config.model)

    # 2. Denoiser and noise schedule
    noise_scheduler = training.load_noise_scheduler(config)
    torch.manual_seed(config.run.seed)
    new, given = new_denoiser(config.model)
    config, model = training.load_denoiser(config, MODELS, new, noise_scheduler, vae, **given)

    # 3. Train
    data = training.load_data(config, images, model=model, vae=vae)
    trainer = training.Trainer(
        model, data, config, noise_scheduler=noise_scheduler, accelerator=accelerator, project_name="unconditional"
    )
    trainer.train()
    trainer.finish()


if __name__ == "__main__":
    run_script(main, parse_args())
