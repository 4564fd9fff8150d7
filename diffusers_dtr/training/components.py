"""The parts of a pipeline that a run is given: its autoencoder and its noise schedule."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoModel,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    SchedulerMixin,
)

from ..latents import latent_channels, vae_scale_factor
from ..models.family import RoutedModelMixin
from ..noise_levels import NoiseLevels
from ..pipelines.model_index import pipeline_class_name
from .arguments import noise_config


# Pipelines on the Hub have it where diffusers had one class for all of its transformers.
_FORMER_NAMES = {"DiTTransformer2DModel": "Transformer2DModel"}


def pretrained_options(args: argparse.Namespace) -> dict[str, Any]:
    """Where and which files of `--pretrained_model_name_or_path` to load, as `from_pretrained` takes it.

    Args:
        args: Parsed flags of [`~diffusers_dtr.training.arguments.add_pretrained_arguments`].
    """
    return {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}


def load_vae(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> ModelMixin | None:
    """The autoencoder of `--vae_name_or_path`, or else of the pretrained pipeline, frozen; None if there is neither.

    Args:
        args: Parsed flags.
        dtype: Its precision, unless its config has `force_upcast`: then it is in float32.
    """
    if args.vae_name_or_path is not None:
        source, options = args.vae_name_or_path, {"cache_dir": args.cache_dir}
    elif pretrained_component(args, "vae") is not None:
        source, options = args.pretrained_model_name_or_path, {"subfolder": "vae", **pretrained_options(args)}
    else:
        return None
    vae = AutoModel.from_pretrained(source, **options, torch_dtype=dtype)
    if vae.config.get("force_upcast") and dtype != torch.float32:
        vae = AutoModel.from_pretrained(source, **options, torch_dtype=torch.float32)
    return vae.requires_grad_(False).eval()


def load_noise_scheduler(args: argparse.Namespace) -> SchedulerMixin:
    """The scheduler to train with: a DDPMScheduler, or flow matching's where the pretrained pipeline has that.

    Args:
        args: Parsed flags. Those of the noise schedule replace what the pretrained pipeline has.

    Raises:
        ValueError: If neither has the noise levels of the pretrained pipeline's scheduler, or a flag does not go with
            flow matching.
        TypeError: If nothing is known about the noise levels of that scheduler.
    """
    config = noise_config(args)
    if args.pretrained_model_name_or_path is None:
        return DDPMScheduler(**config)
    name = pretrained_component(args, "scheduler")
    original = getattr(diffusers, name).from_pretrained(
        args.pretrained_model_name_or_path, subfolder="scheduler", **pretrained_options(args)
    )
    flow = NoiseLevels(original).prediction_type == "flow"
    if flow and config:
        raise ValueError(f"`{'`, `'.join(config)}` must be left out: the pretrained pipeline has flow matching.")
    if flow and args.learn_sigma:
        raise ValueError("`--learn_sigma` must be left out: the pretrained pipeline has flow matching.")
    scheduler_class = FlowMatchEulerDiscreteScheduler if flow else DDPMScheduler
    # What flow matching's own scheduler calls a shift is a `flow_shift` to solvers of its equation.
    shift = {"shift": original.config.flow_shift} if original.config.get("use_flow_sigmas") else {}
    if not _same_noise_levels(original, scheduler_class.from_config(original.config, **shift)):
        raise ValueError(
            "`pretrained_model_name_or_path` must be a pipeline with the noise levels of a DDPMScheduler or a "
            f"FlowMatchEulerDiscreteScheduler, got a {name} with others."
        )
    return scheduler_class.from_config(original.config, **config, **shift)


def _same_noise_levels(one: SchedulerMixin, other: SchedulerMixin) -> bool:
    """Whether a denoiser that was trained with one of them is told and asked the same by the other."""
    one, other = NoiseLevels(one), NoiseLevels(other)
    timesteps = other.timesteps
    return (
        one.prediction_type == other.prediction_type
        and torch.equal(one.timesteps, timesteps)
        and torch.allclose(one.log_snr(timesteps), other.log_snr(timesteps))
    )


def pretrained_pipeline_class(
    name_or_path: str | os.PathLike, *, revision: str | None = None, cache_dir: str | os.PathLike | None = None
) -> str | None:
    """Name of a saved pipeline's class, without loading the pipeline.

    Args:
        name_or_path: Folder, or id on the Hub.
        revision: Of the repository.
        cache_dir: Where downloads are kept.
    """
    index = DiffusionPipeline.load_config(name_or_path, revision=revision, cache_dir=cache_dir)
    return pipeline_class_name(index)


def pretrained_component(args: argparse.Namespace, name: str) -> str | None:
    """Class of a component of `--pretrained_model_name_or_path`, or None if there is none.

    Args:
        args: Parsed flags.
        name: The component's name in the pipeline.
    """
    if args.pretrained_model_name_or_path is None:
        return None
    options = {"revision": args.revision, "cache_dir": args.cache_dir}
    index = DiffusionPipeline.load_config(args.pretrained_model_name_or_path, **options)
    return index.get(name, [None, None])[1]


def pretrained_class_names(args: argparse.Namespace) -> dict[int, str] | None:
    """Names of the classes of `--pretrained_model_name_or_path`, or None if it has none.

    Args:
        args: Parsed flags.

    Raises:
        ValueError: If what the pipeline has are not names by number.
    """
    if args.pretrained_model_name_or_path is None:
        return None
    options = {"revision": args.revision, "cache_dir": args.cache_dir}
    names = DiffusionPipeline.load_config(args.pretrained_model_name_or_path, **options).get("id2label")
    if not names:
        return None
    if not isinstance(names, dict) or not all(key.isdecimal() and isinstance(names[key], str) for key in names):
        raise ValueError(
            f"`id2label` of {args.pretrained_model_name_or_path} must hold names of classes by their numbers."
        )
    return {int(label): name for label, name in names.items()}


def pretrained_denoiser(args: argparse.Namespace, model_classes: Mapping[str, type[RoutedModelMixin]]) -> str:
    """What `--pretrained_model_name_or_path` calls its denoiser.

    Args:
        args: Parsed flags.
        model_classes: The names that it may have, and the class that each is loaded as.

    Raises:
        ValueError: If there is no denoiser of these names and classes, or of those that they route.
    """
    found = {name: pretrained_component(args, name) for name in model_classes}
    for name, model_class in model_classes.items():
        plain = model_class.plain_class.__name__
        if found[name] in {model_class.__name__, plain, _FORMER_NAMES.get(plain, plain)}:
            return name
    allowed = " or ".join(f"a `{name}` of {cls.plain_class.__name__}" for name, cls in model_classes.items())
    raise ValueError(
        f"`pretrained_model_name_or_path` must be a pipeline with {allowed}, plain or routed, got "
        f"{args.pretrained_model_name_or_path} with {found}."
    )


def sample_size(args: argparse.Namespace, vae: ModelMixin | None) -> int:
    """Side of what is learned: of the images, or of an autoencoder's latents.

    Args:
        args: Parsed flags.
        vae: The autoencoder, or None.

    Raises:
        ValueError: If latents do not fill the images.
    """
    factor = 1 if vae is None else vae_scale_factor(vae)
    if args.resolution % factor:
        raise ValueError(
            f"`--resolution` must be a multiple of {factor}, which is what a latent spans, got {args.resolution}."
        )
    return args.resolution // factor


def image_channels(model: ModelMixin, vae: ModelMixin | None) -> int:
    """Channels of the images that a denoiser learns, through an autoencoder if there is one.

    Args:
        model: The denoiser.
        vae: The autoencoder, or None.
    """
    config = (model if vae is None else vae).config
    return config["input_channels" if "input_channels" in config else "in_channels"]


def check_pretrained_denoiser(
    args: argparse.Namespace, model: ModelMixin, vae: ModelMixin | None, packing: int = 1
) -> None:
    """Check that a pretrained denoiser can learn what the flags ask for.

    Args:
        args: Parsed flags.
        model: The denoiser.
        vae: The autoencoder, or None.
        packing: Side of the squares of latents whose channels are those of the denoiser's input.

    Raises:
        ValueError: If it works on latents of another size, or predicts no variance to be learned.
    """
    if vae is not None and (channels := latent_channels(vae)) * packing**2 != model.config.in_channels:
        raise ValueError(
            f"The autoencoder's latents have {channels} channels, but the pretrained model has "
            f"`in_channels`={model.config.in_channels}, of squares of {packing}×{packing}. Leave out "
            "`--vae_name_or_path` to use the pipeline's own."
        )
    if args.learn_sigma and not _learns_variance(model):
        raise ValueError("`--learn_sigma` needs a pretrained model that predicts a variance, and this one does not.")


def sampling_scheduler(noise_scheduler: SchedulerMixin, model: ModelMixin, clip_sample: bool) -> SchedulerMixin:
    """The scheduler of the trained pipeline, of the class that was trained with.

    Args:
        noise_scheduler: Scheduler that is trained with.
        model: The denoiser, whose variance a DDPMScheduler takes, if it predicts one.
        clip_sample: Whether samples of a DDPMScheduler end in [-1, 1]: pixels do, latents do not.
    """
    options = {}
    if isinstance(noise_scheduler, DDPMScheduler):
        variance_type = "learned_range" if _learns_variance(model) else "fixed_small"
        options = {"variance_type": variance_type, "clip_sample": clip_sample}
    return type(noise_scheduler).from_config(noise_scheduler.config, **options)


def _learns_variance(model: ModelMixin) -> bool:
    return model.config.out_channels == 2 * model.config.in_channels
