"""Class-conditional and unconditional image generation, in latent or pixel space."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

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

from ..hub.shared import HubMixin
from ..latents import LatentNormalization, decode_latents, vae_scale_factor
from ..models.evaluating import evaluating
from ..noise_levels import uses_learned_variance
from ..self_contained import SelfContainedMixin
from .model_index import check_model_index


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class DTRPipeline(SelfContainedMixin, HubMixin, DiffusionPipeline):
    r"""Pipeline for image generation with a class-conditional or unconditional denoiser.

    This pipeline inherits from [`~diffusers.DiffusionPipeline`], whose saving, loading, offloading and device handling
    apply.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]): Scheduler that the denoiser is sampled with.
        transformer ([`DTRTransformer2DModel`], *optional*): Denoiser. Exactly one of `transformer` and `unet`.
        unet ([`~diffusers.UNet2DModel`], *optional*): Denoiser. Classes are its `num_class_embeds`.
        vae ([`~diffusers.AutoencoderKL`], *optional*): Decoder of a denoiser that works on latents. Without it the
            denoiser's output is the image, in [-1, 1].
        id2label (`dict[int, str]`, *optional*): Names of the classes. Names separated by commas are synonyms, as in
            ImageNet's.

    Raises:
        ValueError: Unless exactly one of `transformer` and `unet` is given, and it is unconditional or has numbered
            classes.
    """

    model_cpu_offload_seq = "transformer->unet->vae"
    _optional_components = ["transformer", "unet", "vae"]  # noqa: RUF012 - diffusers reads a list here
    _callback_tensor_inputs = ("latents",)

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
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> dict | tuple:
        """Load `model_index.json` as diffusers does, and refuse one that names what is not this pipeline's.

        Raises:
            ValueError: If it names an unknown component, another library or a path. Nothing of it is imported.
        """
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        path = Path(pretrained_model_name_or_path)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        check_model_index(config, path.parent if path.is_file() else path, cls)
        return loaded

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
        labels: dict[str, list[int]] = {}
        for key, names in (self.config.id2label or {}).items():
            for name in dict.fromkeys([names, *(part.strip() for part in names.split(","))]):
                labels.setdefault(name, []).append(int(key))
        return dict(sorted(labels.items()))

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Map names to class labels.

        Args:
            label: One name or several.

        Returns:
            One label per name.

        Raises:
            ValueError: If a name is unknown or stands for more than one class.
        """
        names = [label] if isinstance(label, str) else list(label)
        labels = self.labels
        for name in names:
            if name not in labels:
                known = ", ".join(list(labels)[:20]) or "none, because the pipeline has no `id2label`"
                raise ValueError(f"`class_labels` has no class named {name!r}. Known names: {known}.")
            if len(labels[name]) > 1:
                raise ValueError(
                    f"`class_labels`: {name!r} names the classes {labels[name]}; pass one of these numbers."
                )
        return [labels[name][0] for name in names]

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
            class_labels (`int`, `str`, a sequence of these or `torch.Tensor`, *optional*):
                One class per image, as numbers or as names in `id2label`. None generates without a label, for a
                denoiser that has a null class, or fewer than two classes.
            num_images (`int`, *optional*, defaults to 1):
                How many images to generate where no `class_labels` say so.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                Classifier-free guidance $w$ in $\epsilon_\emptyset + w (\epsilon_c - \epsilon_\emptyset)$
                (arXiv 2207.12598); off at 1 or below.
            guidance_interval (`tuple[float, float]`, *optional*):
                Guide only at timesteps in this closed interval (arXiv 2404.07724). Everywhere by default.
            num_inference_steps (`int`, *optional*, defaults to 50):
                Number of denoising steps.
            generator (`torch.Generator` or list of these, *optional*):
                Source of all randomness; a list has one for every image, which makes an image independent of the
                others, up to rounding.
            latents (`torch.Tensor`, *optional*):
                Gaussian noise of variance 1 to start from, `(images, in_channels, height, width)` of the denoiser.
                Drawn from `generator` by default.
            height (`int`, *optional*): Height of the images in pixels; the denoiser's own by default.
            width (`int`, *optional*): Width of the images in pixels; the denoiser's own by default.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` (`(images, height, width, channels)` in [0, 1]), `"pt"` (`(images, channels, height,
                width)` in [0, 1]) or `"latent"` (the denoiser's own space).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`~diffusers.ImagePipelineOutput`] rather than a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipeline, step, timestep, tensors)` after every step; it may return a dictionary
                with replacements of the tensors.
            callback_on_step_end_tensor_inputs (sequence of `str`, *optional*):
                The tensors that the callback gets; `"latents"` is the only one there is.
            max_batch_size (`int`, *optional*):
                Denoise and decode at most this many images at once, to save memory. Changes the images by no more
                than rounding.

        Examples:
        ```py
        >>> import torch
        >>> from diffusers_dtr import DTRPipeline

        >>> pipe = DTRPipeline.from_pretrained("demo/pipeline")
        >>> images = pipe(
        ...     class_labels=["7", 3], guidance_scale=1.5, generator=torch.manual_seed(0)
        ... ).images
        ```

        Returns:
            [`~diffusers.ImagePipelineOutput`] or a tuple whose only element is the images.

        Raises:
            ValueError: For arguments that do not fit each other, the denoiser or the scheduler, before any work is
                done.
            TypeError: For `class_labels` that are neither integers nor names.
        """
        batch_size, labels = self._resolve_labels(class_labels, num_images)
        self._check_sampling(batch_size, num_inference_steps, generator, output_type, max_batch_size)
        self._check_guidance(guidance_scale, guidance_interval, class_labels)
        self._check_callback(callback_on_step_end_tensor_inputs)
        self._check_channels()
        shape = self._latent_shape(batch_size, height, width)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}.")

        decodes = self.vae is not None and output_type != "latent"
        if decodes:
            LatentNormalization.from_vae(self.vae)  # refuses what could not be decoded, before any work

        device = self._execution_device
        labels = None if labels is None else torch.tensor(labels, device=device)
        # First, because `init_noise_sigma` depends on the timesteps.
        scheduler = self._sampling_scheduler()
        scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = scheduler.timesteps
        latents = randn_tensor(shape, generator, device, self.denoiser.dtype) if latents is None else latents
        latents = latents.to(device, self.denoiser.dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
        low, high = (-float("inf"), float("inf")) if guidance_interval is None else guidance_interval
        # Asked once, because every look at a timestep on the device waits for it.
        scales = [guidance_scale if low <= t <= high else 1.0 for t in timesteps.tolist()]
        step_kwargs = self._step_kwargs(generator)
        max_batch_size = max_batch_size or batch_size
        models = [self.denoiser] if self.vae is None else [self.denoiser, self.vae]

        with evaluating(*models), self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, (timestep, scale) in enumerate(zip(timesteps, scales, strict=True)):
                model_input = latents
                if hasattr(scheduler, "scale_model_input"):
                    model_input = scheduler.scale_model_input(latents, timestep)
                prediction = self.predict(model_input, timestep, labels, scale, max_batch_size)
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
        """What the scheduler's step is given: the guided prediction, with a learned variance if the scheduler uses it.

        Args:
            model_input: `(images, channels, height, width)`.
            timestep: Scalar.
            class_labels: `(images,)`, or None.
            guidance_scale: Guided above 1. Only the prediction is; a learned variance is that of the labelled half.
            max_batch_size: Evaluate at most this many images at once.

        Returns:
            `(images, channels, height, width)`, or twice the channels with a variance.
        """
        slices = model_input.split(max_batch_size or len(model_input))
        label_slices = [None] * len(slices) if class_labels is None else class_labels.split(len(slices[0]))
        outputs = [
            self._predict_slice(inputs, timestep, labels, guidance_scale)
            for inputs, labels in zip(slices, label_slices, strict=True)
        ]
        output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        keep_variance = uses_learned_variance(self.scheduler)
        return output if keep_variance else output[:, : model_input.shape[1]]

    def _predict_slice(self, inputs, timestep, labels, guidance_scale):
        if guidance_scale <= 1:
            return self._evaluate(inputs, timestep, labels)
        null_labels = torch.full_like(labels, self.null_class)
        output = self._evaluate(torch.cat([inputs, inputs]), timestep, torch.cat([labels, null_labels]))
        labelled, unlabelled = output.chunk(2)
        channels = inputs.shape[1]
        guided = unlabelled[:, :channels].lerp(labelled[:, :channels], guidance_scale)
        return torch.cat([guided, labelled[:, channels:]], dim=1)

    def _evaluate(self, inputs, timestep, labels):
        timestep = timestep.to(inputs.device).expand(len(inputs))
        return self.denoiser(inputs, timestep, class_labels=labels, return_dict=False)[0]

    def _resolve_labels(self, class_labels, num_images) -> tuple[int, list[int] | None]:
        """The number of images, and their labels unless the denoiser is unconditional."""
        if class_labels is None:
            batch_size = 1 if num_images is None else num_images
            label = self._label_of_unlabelled()
            return batch_size, None if label is None else [label] * batch_size
        if num_images is not None:
            raise ValueError(
                f"`num_images`={num_images} and `class_labels` cannot both be given: labels count images."
            )
        if self.num_classes is None:
            raise ValueError("`class_labels` must be None: the denoiser is unconditional. Use `num_images`.")
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.reshape(-1).tolist()
        elif isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        if not all(isinstance(label, (str, SupportsIndex)) for label in class_labels):
            raise TypeError(f"`class_labels` must be integers or names, got {class_labels!r}.")
        labels = [self.get_label_ids(label)[0] if isinstance(label, str) else index(label) for label in class_labels]
        highest = self.num_classes - 1 if self.null_class is None else self.null_class
        for label in labels:
            if not 0 <= label <= highest:
                raise ValueError(f"`class_labels` must be in [0, {highest}], got {label}.")
        return len(labels), labels

    def _label_of_unlabelled(self) -> int | None:
        if self.null_class is not None or self.num_classes is None:
            return self.null_class
        if self.num_classes > 1:
            raise ValueError(
                f"`class_labels` must be given: the denoiser has {self.num_classes} classes and no null class."
            )
        return 0

    def _check_sampling(self, batch_size, num_inference_steps, generator, output_type, max_batch_size) -> None:
        if batch_size < 1:
            raise ValueError(f"`num_images` or `class_labels` must ask for at least one image, got {batch_size}.")
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {num_inference_steps}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` must have one generator per image: {batch_size}, got {len(generator)}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        if max_batch_size is not None and max_batch_size < 1:
            raise ValueError(f"`max_batch_size` must be at least 1, got {max_batch_size}.")

    def _check_guidance(self, guidance_scale, guidance_interval, class_labels) -> None:
        if guidance_scale > 1 and self.null_class is None:
            raise ValueError(
                f"`guidance_scale` must be 1, got {guidance_scale}: the denoiser has no null class to be guided away "
                "from. Train it with `class_dropout_prob` above 0."
            )
        if guidance_scale > 1 and class_labels is None:
            raise ValueError(
                f"`guidance_scale`={guidance_scale}, which is above 1, needs `class_labels` to guide towards."
            )
        if guidance_interval is not None and (
            len(guidance_interval) != 2 or guidance_interval[0] > guidance_interval[1]
        ):
            raise ValueError(
                f"`guidance_interval` must be (low, high) timesteps, low <= high, got {guidance_interval}."
            )

    def _check_channels(self) -> None:
        """The denoiser must predict what the scheduler's step takes, with a variance only to use or to drop."""
        config, scheduler = self.denoiser.config, self.scheduler
        name, variance_type = type(scheduler).__name__, scheduler.config.get("variance_type")
        channels = config.in_channels
        predicted = channels if config.out_channels is None else config.out_channels
        allowed = [2 * channels] if uses_learned_variance(scheduler) else [channels, 2 * channels]
        if predicted not in allowed:
            raise ValueError(
                f"The denoiser must predict {' or '.join(map(str, allowed))} channels, from {channels}, for {name} "
                f"with `variance_type`={variance_type!r}, got {predicted}."
            )

    def _check_callback(self, tensor_inputs) -> None:
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, got {unknown}."
            )

    def _latent_shape(self, batch_size, height, width) -> tuple[int, int, int, int]:
        config = self.denoiser.config
        sample_size = config.sample_size
        sizes = list(sample_size) if isinstance(sample_size, (tuple, list)) else [sample_size, sample_size]
        # A U-Net halves its input between one width and the next, and must be able to double it again.
        patch_size = config.patch_size if self.transformer is not None else 2 ** (len(config.block_out_channels) - 1)
        multiple = self.vae_scale_factor * patch_size
        for axis, (name, pixels) in enumerate((("height", height), ("width", width))):
            if pixels is not None and (pixels < 1 or pixels % multiple):
                raise ValueError(f"`{name}` must be a multiple of {multiple}, got {pixels}.")
            if pixels is None and sizes[axis] is None:
                raise ValueError(f"`{name}` must be given: the denoiser's config has no `sample_size`.")
            sizes[axis] = sizes[axis] if pixels is None else pixels // self.vae_scale_factor
        denoiser = unwrap_module(self.denoiser)
        knows_squares_alone = isinstance(denoiser, DiTTransformer2DModel) and not hasattr(denoiser, "routing")
        if knows_squares_alone and sizes[0] != sizes[1]:
            raise ValueError(
                f"`height` and `width` must be equal for {type(denoiser).__name__}, got {height} and {width}. Convert "
                "it with `DTRTransformer2DModel.from_transformer`, which takes rectangular images."
            )
        return (batch_size, config.in_channels, *sizes)

    def _sampling_scheduler(self) -> SchedulerMixin:
        """The scheduler, or one like it that leaves the channels alone which [`predict`] has already chosen."""
        if not _keeps_three_channels(self.scheduler):
            return self.scheduler
        return type(self.scheduler).from_config(self.scheduler.config, variance_type=None)

    def _step_kwargs(self, generator) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if "generator" in accepted else {}


def _keeps_three_channels(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler's step drops a learned variance by taking three channels, whatever it is given.

    The DPM-Solvers and SASolver do so. Others can have the value in their config too, from the scheduler that theirs
    was made of, but have no such argument.
    """
    if (
        uses_learned_variance(scheduler)
        or "variance_type" not in inspect.signature(type(scheduler).__init__).parameters
    ):
        return False
    return (
        scheduler.config.variance_type in ("learned", "learned_range")
        and scheduler.config.prediction_type == "epsilon"
    )
