"""From images or videos to the normalised latents that a denoiser is trained on, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderRAE, ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import nn


@dataclass(frozen=True)
class LatentNormalization:
    """The affine map from a VAE's latents to what the denoiser sees: (latents - shift) * scale.

    Either is a number, or one per channel: `(channels,)`, float32.
    """

    shift: float | torch.Tensor
    scale: float | torch.Tensor

    @classmethod
    def from_vae(cls, vae: ModelMixin) -> LatentNormalization:
        """The normalisation in a VAE's config, read as diffusers' pipelines read it.

        `scaling_factor` and `shift_factor` are Stable Diffusion 3's: (z - shift_factor) * scaling_factor.
        `latents_mean` and `latents_std`, one number per channel, are those of Stable Diffusion XL, Qwen-Image and Wan,
        (z - latents_mean) * scaling_factor / latents_std; LTX-Video has them among its weights. Flux.2 has the running
        statistics of a batch norm, of latents in patches. A ValueError if the config says nothing, or two things that
        cannot both hold.
        """
        scaling_factor, shift_factor = vae.config.get("scaling_factor"), vae.config.get("shift_factor")
        mean, std = _statistics(vae)
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
        mean, std = (torch.as_tensor(values, dtype=torch.float32, device="cpu") for values in (mean, std))
        return cls(mean, (1.0 if scaling_factor is None else scaling_factor) / std)

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """From the VAE's latents to the denoiser's, `(batch, channels, ...)`: of images or of videos."""
        return (latents - _beside(latents, self.shift)) * _beside(latents, self.scale)

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """From the denoiser's latents to the VAE's, `(batch, channels, ...)`."""
        return latents / _beside(latents, self.scale) + _beside(latents, self.shift)


def _statistics(vae: ModelMixin) -> tuple[Any, Any]:
    """Mean and standard deviation of every channel, wherever an autoencoder keeps them; None without."""
    if isinstance(getattr(vae, "bn", None), nn.BatchNorm2d):
        return vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    buffers = dict(vae.named_buffers(recurse=False))
    names = ("latents_mean", "latents_std")
    return tuple(vae.config.get(name) if name in vae.config else buffers.get(name) for name in names)


def _beside(latents: torch.Tensor, value: float | torch.Tensor) -> float | torch.Tensor:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(latents, non_blocking=True).view(-1, *[1] * (latents.ndim - 2))


def _patch_size(vae: ModelMixin) -> int:
    """Side of the patches of Flux.2's latents, which its pipeline makes and not its autoencoder; 1 for others."""
    return vae.config.patch_size[0] if isinstance(getattr(vae, "bn", None), nn.BatchNorm2d) else 1


def encodes_videos(vae: ModelMixin) -> bool:
    """Whether an autoencoder takes `(batch, channels, frames, height, width)`. To it, an image is one frame."""
    return any(isinstance(module, nn.Conv3d) for module in vae.encoder.modules())


@contextmanager
def _upcast(vae: ModelMixin) -> Iterator[None]:
    """Run a VAE whose activations overflow in float16 in float32, as diffusers' pipelines of SDXL do."""
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
        vae: A diffusers autoencoder. It runs in its own precision, but in float32 instead of float16 if its config
            says `force_upcast`.
        pixel_values: Images `(batch, channels, height, width)` or videos `(batch, channels, frames, height, width)`
            in [-1, 1]; a ValueError for videos and an autoencoder of images.

    Returns:
        Mean and standard deviation, `(batch, latent channels, height, width)` of images and with frames of videos,
        float32. The standard deviation is None for a deterministic autoencoder (`AutoencoderDC`, `AutoencoderTiny`,
        `VQModel`).
    """
    one_frame = _is_one_frame(vae, pixel_values, "pixel_values")
    with _upcast(vae):
        pixel_values = pixel_values.to(vae.device, vae.dtype)
        output = vae.encode(pixel_values.unsqueeze(2) if one_frame else pixel_values)
    if "latent_dist" in output:
        moments = output.latent_dist.mean.float(), output.latent_dist.std.float()
    else:
        moments = output.to_tuple()[0].float(), None
    if one_frame:
        moments = tuple(part if part is None else part.squeeze(2) for part in moments)
    return tuple(part if part is None else F.pixel_unshuffle(part, _patch_size(vae)) for part in moments)


def _is_one_frame(vae: ModelMixin, samples: torch.Tensor, name: str) -> bool:
    videos = encodes_videos(vae)
    if samples.ndim != 4 and (samples.ndim != 5 or not videos):
        allowed = "4 dimensions, or 5 with frames" if videos else "4 dimensions"
        raise ValueError(f"`{name}` must have {allowed} for {type(vae).__name__}, got {tuple(samples.shape)}.")
    return videos and samples.ndim == 4


def sample_posterior(
    mean: torch.Tensor,
    std: torch.Tensor | None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> torch.Tensor:
    """Draws mean + std * ε, ε ~ N(0, 1), or returns the mean where there is no standard deviation.

    With one generator per sample, a sample does not depend on the batch it is in. None draws from the global generator
    of the device, as in diffusers.
    """
    if std is None:
        return mean
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator or ())
    device = generators[0].device if generators else mean.device
    noise = randn_tensor(mean.shape, generator=generators or None, device=device, dtype=mean.dtype)
    return mean + std * noise.to(mean.device, non_blocking=True)


def encode_images(
    vae: ModelMixin,
    pixel_values: torch.Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> torch.Tensor:
    """Latents as the denoiser is trained on them: a sample of the VAE's posterior, normalised.

    Args:
        vae: A diffusers autoencoder of images or videos.
        pixel_values: Images `(batch, channels, height, width)` or videos `(batch, channels, frames, height, width)`
            in [-1, 1].
        generator: One generator, or one per sample; None draws from the global generator of the device.

    Returns:
        `(batch, latent channels, height, width)`, with latent frames of videos, on the VAE's device, float32 whatever
        its precision.

    Raises:
        ValueError: If the VAE's config does not say how latents are normalised, or it takes no videos.
    """
    normalization = LatentNormalization.from_vae(vae)
    return normalization.normalize(sample_posterior(*encode_moments(vae, pixel_values), generator))


def decode_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Images or videos of a denoiser's latents: the inverse of [`encode_images`], up to what the VAE loses.

    Args:
        vae: A diffusers autoencoder of images or videos.
        latents: `(batch, latent channels, height, width)`, of videos with latent frames, normalised, on the device
            that the VAE runs on. An offloaded VAE says that it is elsewhere, and brings them where it goes.

    Returns:
        `(batch, channels, height, width)`, of videos with frames, about [-1, 1], in the VAE's precision.
    """
    # Half-precision latents are denormalised in float32, as `encode_images` normalises them.
    one_frame = _is_one_frame(vae, latents, "latents")
    latents = F.pixel_shuffle(LatentNormalization.from_vae(vae).denormalize(latents.float()), _patch_size(vae))
    latents = latents.unsqueeze(2) if one_frame else latents
    dtype = vae.dtype
    # Some of LTX-Video's decoders take the last step of denoising on themselves; its pipeline leaves them none.
    options = {"temb": latents.new_zeros(len(latents))} if vae.config.get("timestep_conditioning") else {}
    with _upcast(vae):
        decoded = vae.decode(latents.to(vae.dtype), **options, return_dict=False)[0].to(dtype)
    return decoded.squeeze(2) if one_frame else decoded


def latent_channels(vae: ModelMixin) -> int:
    """Channels of what [`encode_images`] returns."""
    channels = vae.config["z_dim"] if "z_dim" in vae.config else vae.config["latent_channels"]
    return channels * _patch_size(vae) ** 2


def vae_scale_factor(vae: ModelMixin) -> int:
    """How many pixels a latent spans along each side; a ValueError if neither the VAE nor its config tells."""
    # What the config leaves open, some families compute when they are built. `getattr` would read the config too.
    told = vae.config.get("spatial_compression_ratio") or vars(vae).get("spatial_compression_ratio")
    if told is not None:
        return told
    # Families name the widths of their encoder differently; all halve the image between one width and the next.
    keys = ("block_out_channels", "encoder_block_out_channels", "down_block_out_channels")
    for key in keys:
        if vae.config.get(key) is not None:
            return 2 ** (len(vae.config[key]) - 1) * _patch_size(vae)
    raise ValueError(
        f"`vae` must have `spatial_compression_ratio` or one of {keys} in its config, got {type(vae).__name__}."
    )


def frames_per_latent(vae: ModelMixin) -> int:
    """How many frames of a video a latent spans, but for the first, which spans one; a ValueError if nothing tells."""
    told = vae.config.get("scale_factor_temporal") or vars(vae).get("temporal_compression_ratio")
    if told is None:
        raise ValueError(f"`vae` must say how many frames a latent spans, got {type(vae).__name__}.")
    return told
