"""The parts of a pipeline that a run is given: its autoencoder, and what its denoiser is built with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from diffusers import AutoModel, ModelMixin, SchedulerMixin

from ..latents import latent_channels
from ..models.dit import DTRTransformer2DModel
from ..models.family import Family
from ..models.routed_model import RoutedModelMixin
from ..routing import DEFAULT_TIMESTEP_RANGE
from .config import ModelConfig, RoutingConfig, TrainingConfig
from .data.classes import match_classes
from .data.training_images import TrainingImages
from .noise_schedule import pretrained_scheduler
from .pretrained import (
    pretrained_class_names,
    pretrained_component,
    pretrained_config,
    pretrained_denoiser,
    pretrained_options,
)
from .sizes import default_config, resolve_resolution, sample_size


def load_vae(config: ModelConfig, dtype: torch.dtype = torch.float32) -> ModelMixin | None:
    """The autoencoder of `--vae_name_or_path`, or else of the pretrained pipeline, frozen; None if there is neither.

    Args:
        config: Names it.
        dtype: Its precision, unless its config has `force_upcast`: then it is in float32.
    """
    if config.vae_name_or_path is not None:
        source, options = config.vae_name_or_path, {"cache_dir": config.cache_dir}
    elif pretrained_component(config, "vae") is not None:
        source, options = config.pretrained_model_name_or_path, {"subfolder": "vae", **pretrained_options(config)}
    else:
        return None
    vae = AutoModel.from_pretrained(source, **options, dtype=dtype)
    if vae.config.get("force_upcast") and dtype != torch.float32:
        vae = AutoModel.from_pretrained(source, **options, dtype=torch.float32)
    return vae.requires_grad_(False).eval()


def denoiser_routing(
    config: TrainingConfig, noise_scheduler: SchedulerMixin | None, model_config: Mapping[str, Any]
) -> dict[str, Any]:
    """The config values of a denoiser's routing that options ask for, or that it lacks.

    Args:
        config: The run's configuration.
        noise_scheduler: Scheduler that is trained with; None for a denoiser that is not called with its timesteps,
            whose class knows the range of what it is called with.
        model_config: The config that it would have without them. A range of timesteps that it says is kept, unless it
            is all of a pretrained schedule, and options ask for another number of timesteps.

    Raises:
        ValueError: If options change the number of timesteps, and the range is only a part of them.
    """
    given = config.routing.given
    if noise_scheduler is None or "routing_timestep_range" in given:
        return given
    num_timesteps = noise_scheduler.config.num_train_timesteps
    whole = {**given, "routing_timestep_range": (0, num_timesteps - 1)}
    known = model_config.get("routing_timestep_range")
    if config.model.pretrained_model_name_or_path is None or "routing_timestep_range" not in model_config:
        return whole if known is None else given
    before = pretrained_scheduler(config.model).config.num_train_timesteps
    if before == num_timesteps:
        return given
    if tuple(known or DEFAULT_TIMESTEP_RANGE) == (0, before - 1):
        return whole
    raise ValueError(
        f"`--routing_timestep_range` must be given: the pretrained model is routed over {list(known)} of {before} "
        f"timesteps, and `--num_train_timesteps` asks for {num_timesteps}."
    )


def check_direction(
    config: RoutingConfig, model_class: type[RoutedModelMixin], model_config: Mapping[str, Any]
) -> None:
    """Refuse a range of timesteps that runs against what the denoiser is called with.

    Args:
        config: How it is routed.
        model_class: Its class.
        model_config: Its config, as far as it is not the default.

    Raises:
        ValueError: If the cleanest and the noisiest timestep are the wrong way round.
    """
    given = config.routing_timestep_range
    if given is None:
        return
    own = {**default_config(model_class), **model_config, "routing_timestep_range": None}
    cleanest, noisiest = family_of(model_class).range_of(own)
    if (given[0] < given[1]) != (cleanest < noisiest):
        raise ValueError(
            f"`--routing_timestep_range` must go from the cleanest to the noisiest timestep, as from {cleanest:g} to "
            f"{noisiest:g} for {model_class.__name__}, got {given[0]:g} to {given[1]:g}."
        )


def family_of(model_class: type[ModelMixin]) -> Family:
    """How a routed class is declared; `DTRTransformer2DModel`, which is none of the declared ones, is as most are."""
    return getattr(model_class, "family", Family())


def load_denoiser(
    config: TrainingConfig,
    model_classes: Mapping[str, type[RoutedModelMixin]],
    new: tuple[str, Mapping[str, Any]] | None,
    noise_scheduler: SchedulerMixin,
    vae: ModelMixin | None,
    **given: Any,
) -> tuple[TrainingConfig, RoutedModelMixin]:
    """The denoiser to train: a new one, or the pretrained pipeline's.

    Args:
        config: The run's configuration.
        model_classes: Classes of denoisers by what pipelines call them.
        new: Which of these a new one is, and its config, of which size, channels and routing follow from the run; None
            for the pretrained one.
        noise_scheduler: Scheduler that is trained with.
        vae: The autoencoder, or None.
        **given: Config values that replace its own.

    Returns:
        The configuration with a resolution, and the denoiser, in training mode.

    Raises:
        ValueError: If the denoiser cannot have this size, routing or autoencoder.
    """
    if new is None:
        name = pretrained_denoiser(config.model, model_classes)
        new = name, pretrained_config(config.model, name, model_classes[name])
        path = config.model.pretrained_model_name_or_path
    else:
        path = None
    name, own = new
    config = resolve_resolution(config, vae, model_classes[name], own)
    check_direction(config.routing, model_classes[name], own)
    values = {"sample_size": sample_size(config, vae), **denoiser_routing(config, noise_scheduler, own), **given}
    if path is not None:
        options = pretrained_options(config.model)
        model = model_classes[name].from_pretrained(path, subfolder=name, **options, **values)
        check_pretrained_denoiser(config, model, vae)
        return config, model.train()
    channels = own.get("in_channels", 3) if vae is None else latent_channels(vae)
    shape = {"in_channels": channels, "out_channels": 2 * channels if config.noise.learn_sigma else channels, **given}
    check_new_denoiser(config.model, model_classes[name], shape)
    return config, model_classes[name](**{**own, **shape, **values})


# What decides on the config values of a new denoiser that follow from the data and the options
_DECIDED_BY = {
    "in_channels": "the images or the autoencoder",
    "out_channels": "`in_channels` and `--learn_sigma`",
    "num_embeds_ada_norm": "the classes of the images",
    "class_dropout_prob": "images without labels",
}


def check_new_denoiser(config: ModelConfig, model_class: type[ModelMixin], shape: Mapping[str, Any]) -> None:
    """Refuse a new denoiser's config with unknown names, or against what follows from the data and the options.

    Args:
        config: Has the denoiser's config as an option.
        model_class: The denoiser's class.
        shape: The config values that follow. `sample_size` is that of `--resolution`, whatever the config has.

    Raises:
        ValueError: If the config has a name that there is not, or another value for one of them.
    """
    for flag in (item.name for item in fields(config) if item.name.endswith("_config")):
        given, known = getattr(config, flag) or {}, default_config(model_class)
        for name in given.keys() - known.keys():
            close = get_close_matches(name, known, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"`--{flag}` must have arguments of {model_class.__name__}, got `{name}`.{hint}")
        for name in shape.keys() & given.keys() & _DECIDED_BY.keys():
            if given[name] != shape[name]:
                raise ValueError(
                    f"`{name}` is {given[name]} in `--{flag}`, but {shape[name]} by {_DECIDED_BY[name]}. Leave it "
                    "out, or change the one that is wrong."
                )


def match_pretrained_classes(
    config: ModelConfig, model: DTRTransformer2DModel, images: TrainingImages
) -> TrainingImages:
    """The images with the pretrained model's numbers for the classes whose names it knows.

    Args:
        config: Names the pretrained pipeline.
        model: Its denoiser, which gets new embeddings where there are other or more classes.
        images: With class labels.
    """
    names, num_classes = pretrained_class_names(config), model.config.num_embeds_ada_norm
    images, known = match_classes(images, names, num_classes or 0, new_classes=True)
    if not known or images.num_classes > num_classes:
        model.replace_classes(images.num_classes, keep=known)
    return images


def check_pretrained_denoiser(
    config: TrainingConfig, model: ModelMixin, vae: ModelMixin | None, packing: int = 1
) -> None:
    """Check that a pretrained denoiser can learn what the flags ask for.

    Args:
        config: The run's configuration.
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
    if config.noise.learn_sigma and model.config.out_channels != 2 * model.config.in_channels:
        raise ValueError("`--learn_sigma` needs a pretrained model that predicts a variance, and this one does not.")
