"""The parts of a pipeline that a run is given: its autoencoder, and its denoiser with size, routing and channels."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from diffusers import AutoModel, ModelMixin, SchedulerMixin

from ..latents import latent_channels, vae_scale_factor
from ..models.family import Family
from ..models.routed_model import RoutedModelMixin
from ..pipelines.sampling_checks import size_multiple
from ..routing import DEFAULT_TIMESTEP_RANGE
from .config import ModelConfig, TrainingConfig
from .pretrained import (
    pretrained_component,
    pretrained_config,
    pretrained_denoiser,
    pretrained_options,
    pretrained_scheduler,
)


logger = logging.getLogger(__name__)

_DEFAULT_RESOLUTION = 32


def load_vae(config: ModelConfig, dtype: torch.dtype = torch.float32) -> ModelMixin | None:
    """The frozen autoencoder of `--vae_name_or_path` or the pretrained pipeline, if any.

    It is in the precision `dtype`, or in float32 if its config has `force_upcast`.
    """
    if config.vae_name_or_path is not None:
        source, options = config.vae_name_or_path, {"cache_dir": config.cache_dir}
    elif pretrained_component(config, "vae") is not None:
        source, options = config.pretrained_model_name_or_path, {"subfolder": "vae", **pretrained_options(config)}
    else:
        return None
    vae = AutoModel.from_pretrained(source, **options, dtype=dtype)
    if vae.config.get("force_upcast") and dtype != torch.float32:
        return load_vae(config)
    return vae.requires_grad_(False).eval()


def denoiser_routing(
    config: TrainingConfig,
    noise_scheduler: SchedulerMixin | None,
    model_class: type[RoutedModelMixin],
    model_config: Mapping[str, Any],
) -> dict[str, Any]:
    """The config values of a denoiser's routing that options ask for, or that it lacks.

    A range of timesteps is kept, unless it is all of a pretrained schedule whose length changes. Without a scheduler,
    its class knows the range. A `ValueError` refuses one that runs against what the denoiser is called with.
    """
    given = config.routing.given
    if "routing_timestep_range" in given:
        start, end = given["routing_timestep_range"]
        own = {**default_config(model_class), **model_config, "routing_timestep_range": None}
        cleanest, noisiest = family_of(model_class).range_of(own)
        if (start < end) != (cleanest < noisiest):
            raise ValueError(
                f"`--routing_timestep_range` must go from the cleanest to the noisiest timestep, as from {cleanest:g} "
                f"to {noisiest:g} for {model_class.__name__}, got {start:g} to {end:g}."
            )
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


def family_of(model_class: type[ModelMixin]) -> Family:
    """How a routed class is declared; our own DiT, which is not declared, is as most are."""
    return getattr(model_class, "family", Family())


def load_denoiser(
    config: TrainingConfig,
    model_classes: Mapping[str, type[RoutedModelMixin]],
    new: tuple[str, Mapping[str, Any]] | None,
    noise_scheduler: SchedulerMixin,
    vae: ModelMixin | None,
    **given: Any,
) -> tuple[TrainingConfig, RoutedModelMixin]:
    """The denoiser to train, in training mode, and the configuration with a resolution.

    Args:
        config: The run's configuration.
        model_classes: Classes of denoisers by what pipelines call them.
        new: Which of these a new one is, and its config but for size, channels and routing; None: the pretrained one.
        noise_scheduler: Scheduler that is trained with.
        vae: The autoencoder, or None.
        **given: Config values that replace its own.

    Raises:
        ValueError: If the denoiser cannot have this size, routing or autoencoder.
    """
    name = pretrained_denoiser(config.model, model_classes) if new is None else new[0]
    model_class = model_classes[name]
    own = pretrained_config(config.model, name, model_class) if new is None else new[1]
    config = resolve_resolution(config, vae, model_class, own)
    routing = denoiser_routing(config, noise_scheduler, model_class, own)
    values = {"sample_size": sample_size(config, vae), **routing, **given}
    if new is None:
        path, options = config.model.pretrained_model_name_or_path, pretrained_options(config.model)
        model = model_class.from_pretrained(path, subfolder=name, **options, **values)
        check_pretrained_denoiser(config, model, vae)
        return config, model.train()
    channels = own.get("in_channels", 3) if vae is None else latent_channels(vae)
    shape = {"in_channels": channels, "out_channels": 2 * channels if config.noise.learn_sigma else channels, **given}
    check_new_denoiser(config.model, model_class, shape)
    return config, model_class(**{**own, **shape, **values})


# What decides on the config values of a new denoiser that follow from the data and the options
_DECIDED_BY = {
    "in_channels": "the images or the autoencoder",
    "out_channels": "`in_channels` and `--learn_sigma`",
    "num_embeds_ada_norm": "the classes of the images",
    "class_dropout_prob": "images without labels",
}


def check_new_denoiser(config: ModelConfig, model_class: type[ModelMixin], shape: Mapping[str, Any]) -> None:
    """Refuse a new denoiser's config with unknown names, or against the `shape` that follows from data and options."""
    for flag in (name for name in config.names() if name.endswith("_config")):
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


def check_pretrained_denoiser(
    config: TrainingConfig, model: ModelMixin, vae: ModelMixin | None, packing: int = 1
) -> None:
    """Refuse what a pretrained denoiser cannot learn; `packing` latents a side make its channels."""
    if vae is not None and (channels := latent_channels(vae)) * packing**2 != model.config.in_channels:
        raise ValueError(
            f"The autoencoder's latents have {channels} channels, but the pretrained model has "
            f"`in_channels`={model.config.in_channels}, of squares of {packing}×{packing}. Leave out "
            "`--vae_name_or_path` to use the pipeline's own."
        )
    if config.noise.learn_sigma and model.config.out_channels != 2 * model.config.in_channels:
        raise ValueError("`--learn_sigma` needs a pretrained model that predicts a variance, and this one does not.")


def resolve_resolution(
    config: TrainingConfig, vae: ModelMixin | None, model_class: type[ModelMixin], model_config: Mapping[str, Any]
) -> TrainingConfig:
    """The run's configuration with a resolution that its denoiser can have, by default the one it was made for.

    `model_config` is the denoiser's config, as far as it is not the default. Of other resolutions a `ValueError` says
    which multiple of pixels, or how many at most, the denoiser and the autoencoder work on.
    """
    factor = 1 if vae is None else vae_scale_factor(vae)
    model_config = {**default_config(model_class), **model_config}
    resolution = config.data.resolution
    if resolution is None:
        resolution = _own_resolution(model_config.get("sample_size"), vae)
        logger.info(f"Images of {resolution} pixels a side are trained on, for want of `--resolution`.")
    multiple = size_multiple(model_class, model_config)
    if resolution % (factor * multiple):
        blocks = "pixels" if vae is None else f"latents, which span {factor} pixels each"
        raise ValueError(
            f"`--resolution` must be a multiple of {factor * multiple}, got {resolution}: {model_class.__name__} "
            f"works on whole blocks of {multiple} {blocks}."
        )
    check_positions("resolution", resolution, factor * multiple, model_config)
    return config.replace(resolution=resolution)


def check_positions(flag: str, side: int, token: int, model_config: Mapping[str, Any]) -> None:
    """Refuse images with more tokens of so many pixels along a side than a denoiser has positions for."""
    known = model_config.get("pos_embed_max_size")
    if known is not None and side > known * token:
        raise ValueError(
            f"`--{flag}` must be at most {known * token}, got {side}: the denoiser knows {known} positions along a "
            "side (`pos_embed_max_size`)."
        )


def sample_size(config: TrainingConfig, vae: ModelMixin | None) -> int:
    """Side of what is learned: of the images, or of an autoencoder's latents."""
    return config.data.resolution // (1 if vae is None else vae_scale_factor(vae))


def _own_resolution(sample_size: int | list[int] | None, vae: ModelMixin | None) -> int:
    if sample_size is None and vae is None:
        return _DEFAULT_RESOLUTION
    sides = {sample_size} if isinstance(sample_size, int) else set(sample_size or ())
    if len(sides) != 1:
        raise ValueError(f"`--resolution` must be given: the denoiser's `sample_size` is {sample_size}, no square's.")
    return sides.pop() * (1 if vae is None else vae_scale_factor(vae))


def default_config(model_class: type[ModelMixin]) -> dict[str, Any]:
    """The config of a model without arguments."""
    return {name: parameter.default for name, parameter in inspect.signature(model_class).parameters.items()}


def image_channels(model: ModelMixin | None, vae: ModelMixin | None) -> int:
    """Channels of the images that a denoiser learns, through an autoencoder if there is one."""
    config = (model if vae is None else vae).config
    return config["input_channels" if "input_channels" in config else "in_channels"]
