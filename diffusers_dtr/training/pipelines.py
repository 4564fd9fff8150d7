"""A pipeline in training: what its denoiser is told, how samples are drawn with it, and how the result is saved."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from diffusers import DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.utils import make_image_grid
from PIL import Image

from ..latents import decode_latents
from ..pipelines.pipeline_dtr import DTRPipeline
from ..run_record import TEXT_EMBEDDINGS
from .components import load_vae
from .config import TrainingConfig
from .data.loading import TrainingData
from .data.text_embeddings import (
    CachedTextEmbeddings,
    TextEncoder,
    TextEncoding,
    cache_text_embeddings,
    load_text_embeddings,
)
from .families.base import DenoiserFamily
from .families.parts import frozen_dtype
from .lora import save_lora
from .noise_schedule import sampling_scheduler
from .pretrained import pretrained_class_names, pretrained_options
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
        self.config = config
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

    def sample(self, rows: Sequence[int]) -> list[Image.Image]:
        """Some images of a grid, each with a seed of its own, with the model in eval mode."""
        some = dict(self.sampling)
        if "class_labels" in some:
            some["class_labels"] = [some["class_labels"][row] for row in rows]
        else:
            some["num_images"] = len(rows)
        return self.pipeline(**some, generator=seeded(rows)).images

    def save(self, folder: Path, model: ModelMixin) -> None:
        """Save the result of a run into its folder, with a denoiser that has all its weights."""
        with whole_autoencoder(self), _replaced(self.pipeline, **{self.denoiser: model}):
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
        self.pipeline = self._load(model, data.vae, frozen_dtype(accelerator))
        encoders = _components(self.pipeline, "text_encoder")
        self.settings = frozen_settings(
            autoencoder=data.vae, **{name.replace("_", " "): part for name, part in encoders.items()}
        )
        number, captions = config.validation.num_validation_images, data.images.captions
        prompts = config.text.validation_prompts or [captions[row][0] for row in range(min(number, len(data.images)))]
        self.prompts = [prompts[index % len(prompts)] for index in range(number)]
        encoding = text_encoding(family, self.pipeline, config.text.max_sequence_length, accelerator.device)
        self.encode = self._encoder(encoding, prompts, data, accelerator)
        if isinstance(self.encode, CachedTextEmbeddings):
            for name in encoders:
                setattr(self.pipeline, name, None)

    def _encoder(
        self, encoding: TextEncoding, prompts: Sequence[str], data: TrainingData, accelerator: Accelerator
    ) -> TextEncoder:
        """Text encoders or, of all texts of the run, what they made ahead of training or make now."""
        config, device = self.config, accelerator.device
        latents_dir, captions = getattr(config.data, "latents_dir", None), data.images.captions
        ahead = None if latents_dir is None else load_text_embeddings(latents_dir, encoding, captions, device)
        if ahead is None and not config.text.cache_text_embeddings:
            encoding.to(device)
            return encoding.encode
        datasets, places = ([data.dataset], {}) if ahead is None else ([], ahead.places)
        datasets += [] if data.held_out is None else [data.held_out]
        rest = {"", *prompts, *chain.from_iterable(some.captions.all() for some in datasets)} - places.keys()
        if rest:
            encoding.to(device)
            folder, size = Path(config.run.output_dir) / TEXT_EMBEDDINGS, config.run.train_batch_size
            with accelerator.main_process_first():
                places |= cache_text_embeddings(encoding, rest, folder, batch_size=size, device=device).places
        return CachedTextEmbeddings(places, device)

    def _load(self, model: ModelMixin, vae: ModelMixin, dtype: torch.dtype | None = None) -> DiffusionPipeline:
        """The pretrained pipeline with this denoiser and autoencoder, and the noise schedule of the flags.

        Text encoders are loaded in `dtype`: a cast would undo what they keep in float32 themselves, such as T5's `wo`.
        """
        source = self.config.model
        self.family.check_size(model, vae)
        parts = {self.denoiser: model, "vae": vae, "scheduler": sampling_scheduler(self.config, latents=True)}
        pipeline = DiffusionPipeline.from_pretrained(
            source.pretrained_model_name_or_path, **parts, **pretrained_options(source), dtype=dtype
        )
        # Components that a pipeline can do without (the denoiser, in Wan's) are loaded all the same, and not those
        # given.
        pipeline.register_modules(**parts)
        self.family.check_pipeline(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments that the pipeline itself is called with for the first images of a sample grid."""
        return {"prompt": self.prompts[: self.config.run.train_batch_size], **self._sampling}

    @property
    def _sampling(self) -> dict[str, Any]:
        validation, family = self.config.validation, self.family
        given = {
            "num_inference_steps": validation.validation_num_inference_steps,
            "max_sequence_length": self.config.text.max_sequence_length,
        }
        given = {name: value for name, value in given.items() if value is not None}
        guidance = family.guidance(validation.validation_guidance_scale)
        return {**family.size(), **guidance, **given, **family.sample_options}

    def conditions(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the denoiser beside noisy sample and timestep, on its device."""
        return self.family.conditions(self.pipeline, self.encode(batch["caption"]), batch)

    def denoise(
        self, model: torch.nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]
    ) -> torch.Tensor:
        """As [`DenoiserFamily.denoise`]."""
        return self.family.denoise(self.pipeline, model, noisy, timesteps, conditions)

    def sample(self, rows: Sequence[int]) -> list[Image.Image]:
        """As [`ClassPipeline.sample`]; of videos, strips of their frames."""
        pipeline, family, size = self.pipeline, self.family, self.config.run.train_batch_size
        images = []
        for start in range(0, len(rows), size):
            own = rows[start : start + size]
            some = [self.prompts[row] for row in own]
            given = self._sampling | family.batch(self.encode(some)) | family.start(pipeline, len(some))
            if self.config.validation.validation_guidance_scale > 1:
                negative = family.batch(self.encode([""] * len(some)))
                given |= {f"negative_{name}": embeddings for name, embeddings in negative.items()}
            if "negative_prompt" in inspect.signature(type(pipeline).__call__).parameters:
                given["negative_prompt"] = None  # else some would encode their default beside the embeddings
            latents = pipeline(**given, generator=seeded(own), output_type="latent", return_dict=False)[0]
            # Not by the pipeline, which may have an autoencoder in another precision than its latents.
            with torch.no_grad():
                decoded = decode_latents(
                    pipeline.vae, family.sampled(pipeline, latents, family.latent_size(pipeline.vae))
                )
            if decoded.ndim == 4:
                images += pipeline.image_processor.postprocess(decoded)
            else:
                videos = pipeline.video_processor.postprocess_video(decoded, "pil")
                images += [make_image_grid(frames, rows=1, cols=len(frames)) for frames in videos]
        return images

    def save(self, folder: Path, model: ModelMixin) -> None:
        """Save adapters alone, or a pipeline whose frozen parts are as they were loaded, in full precision."""
        if self.config.lora.rank is not None:
            with _replaced(self.pipeline, **{self.denoiser: model}):
                save_lora(self.pipeline, self.denoiser, folder)
            return
        save_pipeline(self._load(model, load_vae(self.config.model)), folder)


def load_text_encoding(
    config: TrainingConfig, family: DenoiserFamily, dtype: torch.dtype = torch.float32
) -> TextEncoding:
    """How the pretrained pipeline encodes texts, by text encoders in a precision, on this process's device."""
    source, parts = config.model, {family.denoiser: None, "vae": None}
    pipeline = DiffusionPipeline.from_pretrained(
        source.pretrained_model_name_or_path, **parts, **pretrained_options(source), dtype=dtype
    )
    device = PartialState().device
    return text_encoding(family, pipeline, config.text.max_sequence_length, device).to(device)


def text_encoding(
    family: DenoiserFamily, pipeline: DiffusionPipeline, max_sequence_length: int | None, device: torch.device
) -> TextEncoding:
    """How a family's pipeline encodes texts, with its text encoders frozen."""
    options = family.prompt_options(pipeline, max_sequence_length)
    models, tokenizers = (list(_components(pipeline, kind).values()) for kind in ("text_encoder", "tokenizer"))
    for model in models:
        model.requires_grad_(False).eval()
    # What else the pipeline's config says of how texts are encoded
    config = dict(pipeline.config).items()
    own = {name: value for name, value in config if name[0] != "_" and isinstance(value, bool | int | str)}
    settings = {"pipeline": type(pipeline).__name__, **own, **options}
    return TextEncoding(partial(family.encode, pipeline, device=device, options=options), tokenizers, models, settings)


def _components(pipeline: DiffusionPipeline, beginning: str) -> dict[str, Any]:
    """Those whose names begin alike, such as text_encoder, text_encoder_2."""
    parts = pipeline.components.items()
    return {name: part for name, part in parts if name.startswith(beginning) and part is not None}


def seeded(rows: Sequence[int]) -> list[torch.Generator]:
    """A generator for every image of a grid: the same image on any number of processes, on any device."""
    return [torch.Generator().manual_seed(row) for row in rows]


@contextmanager
def whole_autoencoder(part: ClassPipeline | TextPipeline) -> Iterator[ModelMixin | None]:
    """The pipeline's autoencoder, which is loaded for this long if the run has it without weights, or None."""
    vae = part.pipeline.vae
    if vae is None or vae.device.type != "meta":
        yield vae
        return
    loaded = load_vae(part.config.model, vae.dtype).to(PartialState().device)
    with _replaced(part.pipeline, vae=loaded):
        yield loaded


@contextmanager
def _replaced(pipeline: DiffusionPipeline, **parts: ModelMixin) -> Iterator[None]:
    own = {name: getattr(pipeline, name) for name in parts}
    pipeline.register_modules(**parts)
    try:
        yield
    finally:
        pipeline.register_modules(**own)
