"""Train or fine-tune a class-conditional diffusion transformer with Denoising Task Routing.

Run with `accelerate launch train_class_conditional.py --help`; README.md beside this file has complete commands.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from diffusers_dtr import DIT_PRESETS, DTRTransformer2DModel, training
from diffusers_dtr.training.config import (
    BelowOne,
    JSONConfig,
    LabelledDataConfig,
    ModelConfig,
    check_one_source,
    option,
)
from diffusers_dtr.user_errors import run_script


MODELS = {"transformer": DTRTransformer2DModel}


@dataclass(frozen=True)
class DenoiserConfig(ModelConfig):
    """What is trained: a new transformer, or a pretrained one."""

    model_preset: Literal[tuple(DIT_PRESETS)] | None = option(None, "Published size to train from scratch.")
    model_config: JSONConfig = option(
        None, "Config of DTRTransformer2DModel to train from scratch, as JSON or as a JSON file."
    )
    class_dropout_prob: BelowOne | None = option(
        None, "Share of labels that are dropped. Default 0.1, or the pretrained."
    )

    def __post_init__(self):
        super().__post_init__()
        check_one_source(self, "model_preset", "model_config", "pretrained_model_name_or_path")


def parse_args(argv=None):
    parts = {"model": DenoiserConfig, "data": LabelledDataConfig}
    return training.parse_config(argv, description=__doc__, **parts)


def load_transformer(config, noise_scheduler, vae, images):
    options = config.model
    given = {} if options.class_dropout_prob is None else {"class_dropout_prob": options.class_dropout_prob}
    if options.pretrained_model_name_or_path is not None:
        check_null_class(options)
        config, model = training.load_denoiser(config, MODELS, None, noise_scheduler, vae, **given)
        return config, model, training.match_pretrained_classes(options, model, images)
    # The presets are made for latents; pixels have three channels.
    own = {**DIT_PRESETS[options.model_preset], "in_channels": 3} if options.model_preset else options.model_config
    given["num_embeds_ada_norm"] = images.num_classes
    config, model = training.load_denoiser(config, MODELS, ("transformer", own), noise_scheduler, vae, **given)
    return config, model, images


def check_null_class(options):
    source = {"subfolder": "transformer", "revision": options.revision, "cache_dir": options.cache_dir}
    before = DTRTransformer2DModel.load_config(options.pretrained_model_name_or_path, **source)
    before = before.get("class_dropout_prob", 0.1)
    if options.class_dropout_prob is not None and (options.class_dropout_prob > 0) != (before > 0):
        raise ValueError(
            f"`--class_dropout_prob` must be {'above 0' if before else '0'}, got {options.class_dropout_prob}: the "
            f"pretrained model was trained with {before}, and has {'a' if before else 'no'} null class."
        )


def main(config):
    accelerator = training.start_run(config)

    # 1. Images, and the autoencoder in whose latent space they are learned, if there is one
    images = training.load_images(config)
    vae = training.load_vae(config.model)

    # 2. Denoiser and noise schedule
    noise_scheduler = training.load_noise_scheduler(config)
    torch.manual_seed(config.run.seed)
    config, model, images = load_transformer(config, noise_scheduler, vae, images)

    # 3. Train
    data = training.load_data(config, images, model=model, vae=vae)
    trainer = training.Trainer(
        model,
        data,
        config,
        noise_scheduler=noise_scheduler,
        accelerator=accelerator,
        project_name="class-conditional",
    )
    trainer.train()
    trainer.finish()


if __name__ == "__main__":
    run_script(main, parse_args())
