"""Class-conditional and unconditional image generation, in latent or pixel space."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor, unwrap_module
from torch import nn

from ..config_types import built_from_file
from ..evaluating import evaluating
from ..hub import HubMixin, check_token
from ..latents import LatentNormalization, decode_latents, vae_scale_factor
from ..models.routed_model import check_no_weights_missing
from ..noise_levels import uses_learned_variance
from .class_labels import class_named, classes_by_name, labels_of_images, names_of_classes
from .model_index import check_model_index
from .sampling_checks import (
    CALLBACK_TENSORS,
    check_channels,
    check_guidance,
    check_sampling,
    checked_size,
    scheduler_of_chosen_channels,
)


class DTRPipeline(HubMixin, DiffusionPipeline):
    r"""Image generation with a class-conditional or unconditional denoiser.

    Saving, loading, offloading and device handling are those of [`~diffusers.DiffusionPipeline`].

    Args:
        scheduler: Scheduler that the denoiser is sampled with.
        transformer: Denoiser, such as a [`DTRTransformer2DModel`]. Exactly one of `transformer` and `unet`.
        unet: Denoiser, such as a [`~diffusers.UNet2DModel`], whose classes are its `num_class_embeds`.
        vae: Decoder of a denoiser that works on latents. Without it the denoiser's output is the image, in [-1, 1].
        id2label: Names of the classes by number. Names separated by commas are synonyms, as in ImageNet's.

    Raises:
        ValueError: Unless exactly one of `transformer` and `unet` is given, and it is unconditional or has numbered
            classes.
    """

    model_cpu_offload_seq = "transformer->unet->vae"
    _optional_components = ["transformer", "unet", "vae"]  # noqa: RUF012 - diffusers reads a list here
    _callback_tensor_inputs = CALLBACK_TENSORS

    def __init__(
        self,
        scheduler: SchedulerMixin,
        transformer: ModelMixin | None = None,
        unet: ModelMixin | None = None,
        vae: AutoencoderKL | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        if (transformer is None) == (unet is None):
            given = "both" if unet is not None else "neither"
            raise ValueError(f"Exactly one of `transformer` and `unet` must be given, got {given}.")
        self.register_modules(scheduler=scheduler, transformer=transformer, unet=unet, vae=vae)
        class_embed_type = self.denoiser.config.get("class_embed_type")
        if class_embed_type == "identity" or (class_embed_type is not None and self.num_classes is None):
            raise ValueError(
                "`unet` must be unconditional or have numbered classes (`num_class_embeds`), got `class_embed_type`="
                f"{class_embed_type!r} and `num_class_embeds`={self.num_classes}."
            )
        # JSON, in which `model_index.json` keeps them, has no integer keys.
        id2label = None if id2label is None else {str(key): name for key, name in id2label.items()}
        self.register_to_config(id2label=id2label)
        self.vae_scale_factor = 1 if vae is None else vae_scale_factor(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load as diffusers does; refuse an invalid `token`, and files that do not make up a whole pipeline."""
        with built_from_file(f"A {cls.__name__}"):
            pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                check_no_weights_missing(component)
        return pipeline

    @classmethod
    @wraps(DiffusionPipeline.download.__func__)
    def download(cls, *args: Any, **kwargs: Any) -> str:  # noqa: D102
        check_token(kwargs.get("token"))
        return super().download(*args, **kwargs)

    @wraps(DiffusionPipeline.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        check_token(kwargs.get("token"))
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> dict | tuple:
        """Load `model_index.json`, and refuse one that names other components, libraries or paths."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        path = Path(pretrained_model_name_or_path)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        check_model_index(config, path.parent if path.is_file() else path, cls)
        return loaded

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> DTRPipeline:
        """A pipeline of the same components as another one, without copying them.

        Args:
            pipeline: A class-conditional or unconditional one: this class, `DiTPipeline`, `DDPMPipeline` and the like.
            kwargs: Arguments of this class, which replace those of `pipeline`, and `dtype` (or `torch_dtype`), to
                which the components are then cast.

        Raises:
            ValueError: If `pipeline` has components that this one has no use for, such as a text encoder.
        """
        dtypes = [dtype for name in ("dtype", "torch_dtype") if (dtype := kwargs.pop(name, None)) is not None]
        own = [*inspect.signature(cls.__init__).parameters][1:]
        components = {name: part for name, part in pipeline.components.items() if part is not None}
        others = [name for name in components if name not in own]
        if others:
            raise ValueError(
                f"`pipeline` must have no other components than {', '.join(own)}, got a {type(pipeline).__name__} "
                f"with {', '.join(others)}."
            )
        new = cls(**{**components, "id2label": names_of_classes(pipeline), **kwargs})
        return new.to(dtypes[0]) if dtypes else new

    @property
    def denoiser(self) -> ModelMixin:
        """The transformer or U-Net."""
        return self.transformer if self.transformer is not None else self.unet

    @property
    def null_class(self) -> int | None:
        """The label that the denoiser was trained with in place of dropped ones, or None if there is none."""
        denoiser = unwrap_module(self.denoiser)
        # diffusers' own DiT always drops labels, but has no attribute that says so.
        default = denoiser.config.num_embeds_ada_norm if isinstance(denoiser, DiTTransformer2DModel) else None
        return getattr(denoiser, "null_class", default)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None for an unconditional denoiser."""
        config = self.denoiser.config
        return config.get("num_embeds_ada_norm") if self.transformer is not None else config.get("num_class_embeds")

    @property
    def labels(self) -> dict[str, list[int]]:
        """The classes that each name stands for; more than one where `id2label` repeats a name."""
        return classes_by_name(self.config.id2label)

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The class of each name; a ValueError for one that is unknown or stands for more than one class."""
        classes = self.labels
        return [class_named(name, classes) for name in ([label] if isinstance(label, str) else label)]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        num_images: int | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DTRPipeline, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""Generate images.

        Args:
            class_labels: One class per image: an `int` is its number, a `str` its name in `id2label`. The two differ
                where names are numbers: `2` is the class of this number, `"2"` the one of this name, which may be
                class 5. None generates without a label, for a denoiser that has a null class, or fewer than two
                classes.
            num_images: How many images to generate where no `class_labels` say so; 1 by default.
            guidance_scale: Classifier-free guidance $w$ in $\epsilon_\emptyset + w (\epsilon_c - \epsilon_\emptyset)$
                (arXiv 2207.12598); off at 1 or below.
            guidance_interval: Guide only at timesteps in this closed interval (arXiv 2404.07724). Everywhere by
                default.
            num_inference_steps: Number of denoising steps.
            generator: Source of all randomness; a list has one for every image, which makes an image independent of
                the others, up to rounding.
            latents: Gaussian noise of variance 1 to start from, `(images, in_channels, height, width)` of the
                denoiser. Drawn from `generator` by default.
            height: Height of the images in pixels; the denoiser's own by default.
            width: Width of the images in pixels; the denoiser's own by default.
            output_type: `"pil"`, `"np"` (`(images, height, width, channels)` in [0, 1]), `"pt"` (`(images, channels,
                height, width)` in [0, 1]) or `"latent"` (the denoiser's own space).
            return_dict: Whether to return an [`~diffusers.ImagePipelineOutput`] rather than a tuple of the images.
            callback_on_step_end: Called as `callback(pipeline, step, timestep, tensors)` after every step; it may
                return a dictionary with replacements of the tensors.
            callback_on_step_end_tensor_inputs: The tensors that the callback gets; `"latents"` is the only one.
            max_batch_size: Denoise and decode at most this many images at once, to save memory. Changes the images by
                no more than rounding.

        Examples:
        ```py
        >>> import torch
        >>> from diffusers_dtr import DTRPipeline

        >>> pipe = DTRPipeline.from_pretrained("./demo/pipeline")
        >>> images = pipe(
        ...     class_labels=["7", 3], guidance_scale=1.5, generator=torch.manual_seed(0)
        ... ).images
        ```

        Raises:
            ValueError: For arguments that do not fit each other, the denoiser or the scheduler, before any work is
                done.
            TypeError: For `class_labels` that are neither integers nor names.
        """
        null_class = self.null_class
        batch_size, labels = labels_of_images(
            class_labels, num_images, classes=self.labels, num_classes=self.num_classes, null_class=null_class
        )
        tensors = callback_on_step_end_tensor_inputs
        check_sampling(batch_size, num_inference_steps, generator, output_type, max_batch_size, tensors)
        check_guidance(guidance_scale, guidance_interval, is_labelled=class_labels is not None, null_class=null_class)
        check_channels(self.denoiser, self.scheduler)
        size = checked_size(self.denoiser, self.vae_scale_factor, height, width)
        shape = (batch_size, self.denoiser.config.in_channels, *size)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}.")

        decodes = self.vae is not None and output_type != "latent"
        if decodes:
            LatentNormalization.from_vae(self.vae)  # refuses what could not be decoded, before any work

        device = self._execution_device
        labels = None if labels is None else torch.tensor(labels, device=device)
        # First, because `init_noise_sigma` depends on the timesteps.
        scheduler = scheduler_of_chosen_channels(self.scheduler)
        # On the CPU, where a scheduler looks at the timestep: every look at one on the device waits for it.
        scheduler.set_timesteps(num_inference_steps, device="cpu")
        timesteps = scheduler.timesteps
        latents = randn_tensor(shape, generator, device, self.denoiser.dtype) if latents is None else latents
        latents = latents.to(device, self.denoiser.dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
        low, high = (-float("inf"), float("inf")) if guidance_interval is None else guidance_interval
        scales = [guidance_scale if low <= t <= high else 1.0 for t in timesteps.tolist()]
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}
        max_batch_size = max_batch_size or batch_size
        models = [self.denoiser] if self.vae is None else [self.denoiser, self.vae]

        on_device = timesteps.to(device)
        with evaluating(*models), self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, (timestep, scale) in enumerate(zip(timesteps, scales, strict=True)):
                model_input = latents
                if hasattr(scheduler, "scale_model_input"):
                    model_input = scheduler.scale_model_input(latents, timestep)
                prediction = self.predict(model_input, on_device[step], labels, scale, max_batch_size)
                latents = scheduler.step(prediction, timestep, latents, **step_kwargs, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
                    latents = (callback_on_step_end(self, step, timestep, tensors) or {}).get("latents", latents)
                progress_bar.update()
            images = latents
            if decodes:
                images = torch.cat([decode_latents(self.vae, part) for part in latents.split(max_batch_size)])

        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def predict(
        self,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        guidance_scale: float = 1.0,
        max_batch_size: int | None = None,
    ) -> torch.Tensor:
        """The guided prediction for the scheduler's step: `(images, channels, height, width)`.

        A scheduler that uses a learned variance gets twice the channels.

        Args:
            model_input: `(images, channels, height, width)`.
            timestep: Scalar.
            class_labels: `(images,)`, or None.
            guidance_scale: Guided above 1. Only the prediction is; a learned variance is that of the labelled half.
            max_batch_size: Evaluate at most this many images at once.
        """
        slices = model_input.split(max_batch_size or len(model_input))
        label_slices = [None] * len(slices) if class_labels is None else class_labels.split(len(slices[0]))
        outputs = [
            self._predict_slice(inputs, timestep, labels, guidance_scale)
            for inputs, labels in zip(slices, label_slices, strict=True)
        ]
        output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return output if uses_learned_variance(self.scheduler) else output[:, : model_input.shape[1]]

    def _predict_slice(self, inputs, timestep, labels, guidance_scale):
        channels, is_guided = inputs.shape[1], guidance_scale > 1
        if is_guided:
            inputs, labels = torch.cat([inputs, inputs]), torch.cat([labels, torch.full_like(labels, self.null_class)])
        # One for the whole batch, of which the denoiser computes what depends on it once.
        timestep = timestep.to(inputs.device).reshape(1)
        output = self.denoiser(inputs, timestep, class_labels=labels, return_dict=False)[0]
        if not is_guided:
            return output
        labelled, unlabelled = output.chunk(2)
        guided = unlabelled[:, :channels].lerp(labelled[:, :channels], guidance_scale)
        return torch.cat([guided, labelled[:, channels:]], dim=1)
