"""How large what is learned is: images in pixels, or latents of an autoencoder."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from diffusers import ModelMixin

from ..latents import vae_scale_factor
from ..pipelines.sampling_checks import size_multiple
from .config import TrainingConfig


logger = logging.getLogger(__name__)

_DEFAULT_RESOLUTION = 32


def resolve_resolution(
    config: TrainingConfig, vae: ModelMixin | None, model_class: type[ModelMixin], model_config: Mapping[str, Any]
) -> TrainingConfig:
    """The run's configuration with a resolution that its denoiser can have, by default the one it was made for.

    Args:
        config: The run's configuration.
        vae: The autoencoder, or None.
        model_class: The denoiser's class.
        model_config: The denoiser's config, as far as it is not the default.

    Raises:
        ValueError: If latents do not fill the images, or the denoiser cannot have latents or images of this size.
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
    most = model_config.get("pos_embed_max_size")
    if most is not None and resolution // factor > most * multiple:
        raise ValueError(
            f"`--resolution` must be at most {most * multiple * factor}, got {resolution}: the denoiser knows {most} "
            "positions along a side (`pos_embed_max_size`)."
        )
    return config.replace(resolution=resolution)


def sample_size(config: TrainingConfig, vae: ModelMixin | None) -> int:
    """Side of what is learned: of the images, or of an autoencoder's latents.

    Args:
        config: The run's configuration, after [`resolve_resolution`].
        vae: The autoencoder, or None.
    """
    return config.data.resolution // (1 if vae is None else vae_scale_factor(vae))


def _own_resolution(sample_size: int | list[int] | None, vae: ModelMixin | None) -> int:
    if sample_size is None and vae is None:
        return _DEFAULT_RESOLUTION
    sides = {sample_size} if isinstance(sample_size, int) else set(sample_size or ())
    if len(sides) != 1:
        raise ValueError(
            f"`--resolution` must be given: the denoiser's config has `sample_size`={sample_size}, no square's."
        )
    return sides.pop() * (1 if vae is None else vae_scale_factor(vae))


def default_config(model_class: type[ModelMixin]) -> dict[str, Any]:
    """The config of a model without arguments."""
    return {name: parameter.default for name, parameter in inspect.signature(model_class).parameters.items()}


def image_channels(model: ModelMixin, vae: ModelMixin | None) -> int:
    """Channels of the images that a denoiser learns, through an autoencoder if there is one.

    Args:
        model: The denoiser.
        vae: The autoencoder, or None.
    """
    config = (model if vae is None else vae).config
    return config["input_channels" if "input_channels" in config else "in_channels"]
