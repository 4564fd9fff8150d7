"""The parts of a pipeline that a run is given: its autoencoder, and what its denoiser is built with."""

from __future__ import annotations

import argparse
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoModel, ModelMixin, SchedulerMixin

from ..latents import latent_channels, vae_scale_factor
from ..pipelines.sampling_checks import size_multiple
from ..routing import DEFAULT_TIMESTEP_RANGE
from .arguments import routing_flags
from .noise_schedule import pretrained_scheduler
from .pretrained import pretrained_component, pretrained_options


logger = logging.getLogger(__name__)

_DEFAULT_RESOLUTION = 32


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
    vae = AutoModel.from_pretrained(source, **options, dtype=dtype)
    if vae.config.get("force_upcast") and dtype != torch.float32:
        vae = AutoModel.from_pretrained(source, **options, dtype=torch.float32)
    return vae.requires_grad_(False).eval()


# What decides on the config values of a new denoiser that follow from the data and the flags
_DECIDED_BY = {
    "in_channels": "the images or the autoencoder",
    "out_channels": "`in_channels` and `--learn_sigma`",
    "num_embeds_ada_norm": "the classes of the images",
    "class_dropout_prob": "images without labels",
}


def check_new_denoiser(args: argparse.Namespace, flag: str, shape: Mapping[str, Any]) -> None:
    """Refuse a new denoiser's config that contradicts what follows from the data and the flags.

    Args:
        args: Parsed flags.
        flag: That of the config; it need not be given.
        shape: The config values that follow. `sample_size` is that of `--resolution`, whatever the config has.

    Raises:
        ValueError: If the config has another value for one of them.
    """
    config = getattr(args, flag) or {}
    for name, value in shape.items():
        if name != "sample_size" and config.get(name, value) != value:
            raise ValueError(
                f"`{name}` is {config[name]} in `--{flag}`, but {value} by {_DECIDED_BY[name]}. Leave it out, or "
                "change the one that is wrong."
            )


def denoiser_config(
    args: argparse.Namespace,
    noise_scheduler: SchedulerMixin,
    vae: ModelMixin | None,
    model_class: type[ModelMixin],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """The config values of a denoiser that follow from the flags and the noise schedule: its size and its routing.

    Args:
        args: Parsed flags.
        noise_scheduler: Scheduler that is trained with.
        vae: The autoencoder, or None.
        model_class: The denoiser's class.
        config: The config that it would have without them: of the pretrained model, or of the new one.

    Raises:
        ValueError: As [`sample_size`] and [`denoiser_routing`].
    """
    size = sample_size(args, vae, model_class, config)
    return {"sample_size": size, **denoiser_routing(args, noise_scheduler, config)}


def denoiser_routing(
    args: argparse.Namespace, noise_scheduler: SchedulerMixin | None, config: Mapping[str, Any]
) -> dict[str, Any]:
    """The config values of a denoiser's routing that flags ask for, or that it lacks.

    Args:
        args: Parsed flags.
        noise_scheduler: Scheduler that is trained with; None for a denoiser that is not called with its timesteps,
            whose class knows the range of what it is called with.
        config: The config that it would have without them. A range of timesteps that it says is kept, unless it is
            all of a pretrained schedule, and flags ask for another number of timesteps.

    Raises:
        ValueError: If flags change the number of timesteps, and the range is only a part of them.
    """
    given = routing_flags(args)
    if noise_scheduler is None or "routing_timestep_range" in given:
        return given
    num_timesteps = noise_scheduler.config.num_train_timesteps
    whole = {**given, "routing_timestep_range": (0, num_timesteps - 1)}
    known = config.get("routing_timestep_range")
    if args.pretrained_model_name_or_path is None or "routing_timestep_range" not in config:
        return whole if known is None else given
    before = pretrained_scheduler(args).config.num_train_timesteps
    if before == num_timesteps:
        return given
    if tuple(known or DEFAULT_TIMESTEP_RANGE) == (0, before - 1):
        return whole
    raise ValueError(
        f"`--routing_timestep_range` must be given: the pretrained model is routed over {list(known)} of {before} "
        f"timesteps, and `--num_train_timesteps` asks for {num_timesteps}."
    )


def sample_size(
    args: argparse.Namespace, vae: ModelMixin | None, model_class: type[ModelMixin], config: Mapping[str, Any]
) -> int:
    """Side of what is learned: of the images, or of an autoencoder's latents.

    Args:
        args: Parsed flags. Without `--resolution`, it becomes the one that the denoiser is made for.
        vae: The autoencoder, or None.
        model_class: The denoiser's class.
        config: The denoiser's config, as far as it is not the default.

    Raises:
        ValueError: If latents do not fill the images, or the denoiser cannot have latents or images of this size.
    """
    factor = 1 if vae is None else vae_scale_factor(vae)
    config = {**_defaults(model_class), **config}
    if args.resolution is None:
        args.resolution = _own_resolution(config.get("sample_size"), vae)
        logger.info(f"Images of {args.resolution} pixels a side are trained on, for want of `--resolution`.")
    multiple = size_multiple(model_class, config)
    if args.resolution % (factor * multiple):
        blocks = "pixels" if vae is None else f"latents, which span {factor} pixels each"
        raise ValueError(
            f"`--resolution` must be a multiple of {factor * multiple}, got {args.resolution}: {model_class.__name__} "
            f"works on whole blocks of {multiple} {blocks}."
        )
    size, most = args.resolution // factor, config.get("pos_embed_max_size")
    if most is not None and size > most * multiple:
        raise ValueError(
            f"`--resolution` must be at most {most * multiple * factor}, got {args.resolution}: the denoiser knows "
            f"{most} positions along a side (`pos_embed_max_size`)."
        )
    return size


def _own_resolution(sample_size: int | list[int] | None, vae: ModelMixin | None) -> int:
    if sample_size is None and vae is None:
        return _DEFAULT_RESOLUTION
    sides = {sample_size} if isinstance(sample_size, int) else set(sample_size or ())
    if len(sides) != 1:
        raise ValueError(
            f"`--resolution` must be given: the denoiser's config has `sample_size`={sample_size}, no square's."
        )
    return sides.pop() * (1 if vae is None else vae_scale_factor(vae))


def _defaults(model_class: type[ModelMixin]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(model_class).parameters.items()}


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
    if args.learn_sigma and model.config.out_channels != 2 * model.config.in_channels:
        raise ValueError("`--learn_sigma` needs a pretrained model that predicts a variance, and this one does not.")
