"""A pipeline in training: what its denoiser is told, how samples are drawn with it, and how the result is saved."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin, UNet2DModel
from PIL import Image

from ..pipelines.pipeline_dtr import DTRPipeline
from .components import load_vae
from .config import TrainingConfig
from .data.loading import TrainingData
from .families.base import DenoiserFamily
from .families.parts import (
    build_text_encoder,
    frozen_dtype,
    load_family_pipeline,
    sample_texts,
    sampling_arguments,
)
from .lora import save_lora
from .noise_schedule import sampling_scheduler
from .pretrained import pretrained_class_names
from .run.folder import save_pipeline
from .run.resuming import frozen_settings


class ClassPipeline:
    """A [`DTRPipeline`] in training: class-conditional where the data have labels, else unconditional.

    Attributes:
        pipeline: The pipeline.
        denoiser: What it calls its denoiser: "transformer" or "unet".
        sampling: Arguments that the pipeline is called with for a sample grid, beside a generator.
        settings: Its frozen parts as settings of a run.
    """

    def __init__(self, config: TrainingConfig, model: ModelMixin, data: TrainingData):
        self.settings = {} if data.vae is None else frozen_settings(autoencoder=data.vae)
        images, validation = data.images, config.validation
        names = pretrained_class_names(config.model) if images.labels is None else images.id2label
        self.denoiser = "unet" if isinstance(model, UNet2DModel) else "transformer"
        self.pipeline = DTRPipeline(
            sampling_scheduler(config, latents=data.vae is not None),
            **{self.denoiser: model},
            vae=data.vae,
            id2label=names,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.sampling = {
            "num_inference_steps": validation.validation_num_inference_steps,
            "max_batch_size": config.run.train_batch_size,
        }
        if images.labels is None:
            self.sampling["num_images"] = validation.num_validation_images
            return
        scale, classes = validation.validation_guidance_scale, images.classes
        if scale > 1 and self.pipeline.null_class is None:
            raise ValueError(
                f"`--validation_guidance_scale` must be 1, got {scale}: without dropped labels "
                "(`--class_dropout_prob`) the model has no null class to be guided away from."
            )
        labels = [classes[index % len(classes)] for index in range(validation.num_validation_images)]
        self.sampling |= {"class_labels": labels, "guidance_scale": scale}

    def conditions(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the denoiser beside noisy sample and timestep, on its device."""
        if "class_labels" not in self.sampling:
            return {}
        device = getattr(self.pipeline, self.denoiser).device
        return {"class_labels": batch["labels"].to(device, non_blocking=True)}

    def denoise(
        self, model: torch.nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]
    ) -> torch.Tensor:
        """The prediction of a denoiser, or of a wrapper of it, with the channels of a variance if it has one."""
        return model(noisy, timestep=timesteps, **conditions, return_dict=False)[0]

    def sample(self, generator: torch.Generator) -> list[Image.Image]:
        """The images of a grid. The main process alone calls it, with the model in eval mode."""
        return self.pipeline(**self.sampling, generator=generator).images

    def save(self, folder: Path) -> None:
        """Save the result of a run into its folder."""
        save_pipeline(self.pipeline, folder)


class TextPipeline:
    """A family's pipeline in training, whole or by adapters; images or videos. As [`ClassPipeline`]."""

    def __init__(
        self,
        config: TrainingConfig,
        family: DenoiserFamily,
        model: ModelMixin,
        data: TrainingData,
        accelerator: Accelerator,
    ):
        self.config, self.family, self.denoiser = config, family, family.denoiser
        self.pipeline = load_family_pipeline(config, family, model, data.vae, frozen_dtype(accelerator))
        parts = self.pipeline.components.items()
        encoders = {name.replace("_", " "): part for name, part in parts if part and name.startswith("text_encoder")}
        self.settings = frozen_settings(autoencoder=data.vae, **encoders)
        number = config.validation.num_validation_images
        captions = data.images.captions
        prompts = config.text.validation_prompts or [captions[row][0] for row in range(min(number, len(data.images)))]
        self.prompts = [prompts[index % len(prompts)] for index in range(number)]
        sources = [data.dataset] if data.held_out is None else [data.dataset, data.held_out]
        texts = chain([""], prompts, *(source.captions.all() for source in sources))
        self.encode = build_text_encoder(config, family, self.pipeline, texts, accelerator)

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments that the pipeline itself is called with for the first images of a sample grid."""
        return {
            "prompt": self.prompts[: self.config.run.train_batch_size],
            **sampling_arguments(self.config, self.family),
        }

    def conditions(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the denoiser is told of a batch, by its arguments."""
        return self.family.conditions(self.pipeline, self.encode(batch["caption"]), batch)

    def denoise(
        self, model: torch.nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]
    ) -> torch.Tensor:
        """The scheduler's `model_output`."""
        return self.family.denoise(self.pipeline, model, noisy, timesteps, conditions)

    def sample(self, generator: torch.Generator) -> list[Image.Image]:
        """The images of a grid; of videos, strips of their frames."""
        return sample_texts(self.config, self.family, self.pipeline, self.encode, self.prompts, generator)

    def save(self, folder: Path) -> None:
        """Save adapters alone, or a pipeline whose frozen parts are as they were loaded, in full precision."""
        if self.config.lora.rank is not None:
            save_lora(self.pipeline, self.denoiser, folder)
            return
        model = getattr(self.pipeline, self.denoiser)
        save_pipeline(load_family_pipeline(self.config, self.family, model, load_vae(self.config.model)), folder)
