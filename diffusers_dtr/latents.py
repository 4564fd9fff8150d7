"""Between images and the latents that a denoiser is trained on: encode, normalise, decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import AutoencoderRAE, ModelMixin
from diffusers.utils.torch_utils import randn_tensor


@dataclass(frozen=True)
class LatentNormalization:
    """The affine map from a VAE's latents to what the denoiser sees: (latents - shift) * scale.

    Attributes:
        shift: A number, or one per channel: `(channels, 1, 1)`, float32.
        scale: As `shift`.
    """

    shift: float | torch.Tensor
    scale: float | torch.Tensor

    @classmethod
    def from_vae(cls, vae: ModelMixin) -> LatentNormalization:
        """What the VAE's config says, read as diffusers' pipelines read it.

        `scaling_factor` and `shift_factor` are Stable Diffusion 3's: (z - shift_factor) * scaling_factor.
        `latents_mean` and `latents_std`, one number per channel, are Stable Diffusion XL's: (z - latents_mean) *
        scaling_factor / latents_std.

        Args:
            vae: A diffusers autoencoder of images.

        Raises:
            ValueError: If the config says nothing, or two things that cannot both hold.
        """
        scaling_factor, shift_factor = vae.config.get("scaling_factor"), vae.config.get("shift_factor")
        mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
        name = type(vae).__name__
        if isinstance(vae, AutoencoderRAE):
            raise ValueError(
                "`vae` must leave normalisation to the caller, got an AutoencoderRAE, which does its own."
            )
        if (mean is None) != (std is None):
            raise ValueError(
                f"`latents_mean` and `latents_std` go together, but the config of {name} has one of them."
            )
        if mean is not None and shift_factor:
            raise ValueError(f"The config of {name} has both `latents_mean` and `shift_factor`={shift_factor}.")
        if mean is None and scaling_factor is None:
            raise ValueError(
                f"`vae` must have `scaling_factor`, or `latents_mean` and `latents_std`, in its config: {name} has "
                "none, so its latents cannot be brought to unit variance. Register the factor with "
                "`vae.register_to_config(scaling_factor=...)`."
            )
        if mean is None:
            return cls(shift_factor or 0.0, scaling_factor)
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
        return cls(mean, (1.0 if scaling_factor is None else scaling_factor) / std)

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """From the VAE's latents to the denoiser's, `(..., channels, height, width)`."""
        return (latents - _beside(latents, self.shift)) * _beside(latents, self.scale)

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """From the denoiser's latents to the VAE's, `(..., channels, height, width)`."""
        return latents / _beside(latents, self.scale) + _beside(latents, self.shift)


def _beside(latents: torch.Tensor, value: float | torch.Tensor) -> float | torch.Tensor:
    return value.to(latents, non_blocking=True) if isinstance(value, torch.Tensor) else value


@contextmanager
def _upcast(vae: ModelMixin) -> Iterator[None]:
    """In float32 meanwhile, if the activations of a VAE overflow in float16: as in diffusers' pipelines of SDXL."""
    overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if overflows:
        vae.float()
    try:
        yield
    finally:
        if overflows:
            vae.half()


@torch.no_grad()
def encode_moments(vae: ModelMixin, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean and standard deviation of the VAE's posterior, not yet normalised.

    Args:
        vae: A diffusers autoencoder of images. It runs in its own precision, but in float32 instead of float16 if its
            config says `force_upcast`.
        pixel_values: `(batch, channels, height, width)` in [-1, 1].

    Returns:
        Mean and standard deviation, `(batch, latent channels, height, width)`, float32. The standard deviation is
        None for a deterministic autoencoder (`AutoencoderDC`, `AutoencoderTiny`, `VQModel`).
    """
    with _upcast(vae):
        output = vae.encode(pixel_values.to(vae.device, vae.dtype))
    if "latent_dist" in output:
        return output.latent_dist.mean.float(), output.latent_dist.std.float()
    (latents,) = output.to_tuple()
    return latents.float(), None


def sample_posterior(
    mean: torch.Tensor,
    std: torch.Tensor | None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> torch.Tensor:
    """Draws mean + std * ε, ε ~ N(0, 1), or returns the mean where there is no standard deviation.

    Args:
        mean: `(batch, channels, height, width)`.
        std: As `mean`, or None.
        generator: One generator, or one per sample: then a sample does not depend on the batch it is in. None draws
            from the global generator of the device, as in diffusers.
    """
    if std is None:
        return mean
    generator = list(generator) if isinstance(generator, Sequence) else generator
    return mean + std * randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)


def encode_images(
    vae: ModelMixin,
    pixel_values: torch.Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> torch.Tensor:
    """Latents as the denoiser is trained on them: a sample of the VAE's posterior, normalised.

    Args:
        vae: A diffusers autoencoder of images, see [`encode_moments`].
        pixel_values: `(batch, channels, height, width)` in [-1, 1].
        generator: See [`sample_posterior`].

    Returns:
        `(batch, latent channels, height, width)` on the VAE's device, float32 whatever its precision.

    Raises:
        ValueError: If the VAE's config does not say how latents are normalised.
    """
    normalization = LatentNormalization.from_vae(vae)
    return normalization.normalize(sample_posterior(*encode_moments(vae, pixel_values), generator))


def decode_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Images of a denoiser's latents: the inverse of [`encode_images`], up to what the VAE loses.

    Args:
        vae: A diffusers autoencoder of images.
        latents: `(batch, latent channels, height, width)`, normalised, on the device that the VAE runs on. An
            offloaded VAE says that it is elsewhere, and brings them where it goes.

    Returns:
        `(batch, channels, height, width)`, about [-1, 1], in the VAE's precision.

    Raises:
        ValueError: If the VAE's config does not say how latents are normalised.
    """
    # Half-precision latents are denormalised in float32, as `encode_images` normalises them.
    latents = LatentNormalization.from_vae(vae).denormalize(latents.float())
    dtype = vae.dtype
    with _upcast(vae):
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0].to(dtype)


def vae_scale_factor(vae: ModelMixin) -> int:
    """How many pixels a latent spans along each side.

    Args:
        vae: A diffusers autoencoder of images.

    Raises:
        ValueError: If the VAE's config has none of the keys that tell.
    """
    if vae.config.get("spatial_compression_ratio") is not None:
        return vae.config["spatial_compression_ratio"]
    # Families name the widths of their encoder differently; all halve the image between one width and the next.
    keys = ("block_out_channels", "encoder_block_out_channels", "down_block_out_channels")
    for key in keys:
        if vae.config.get(key) is not None:
            return 2 ** (len(vae.config[key]) - 1)
    raise ValueError(
        f"`vae` must have `spatial_compression_ratio` or one of {keys} in its config, got {type(vae).__name__}."
    )
