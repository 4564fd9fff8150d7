"""From an encoded image of whatever kind to a tensor: decode with Pillow, resize, crop, flip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps


_MODES = {1: "L", 3: "RGB"}


class UnreadableImageError(ValueError):
    """An image is truncated, missing or not an image."""


def decode_image(encoded: Mapping[str, bytes | str | None] | None) -> Image.Image:
    """Decodes an image and turns it upright, as its EXIF data tell.

    Args:
        encoded: The row of an undecoded image column of 🤗 datasets: `bytes`, or the `path` of a local file.

    Returns:
        An image of mode L, RGB or RGBA. Grey values of 16 bits are scaled to 8.

    Raises:
        UnreadableImageError: If there is no image, or one that Pillow cannot decode to the end, or its values have no
            defined range.
    """
    if encoded is None:
        raise UnreadableImageError("the row has none")
    source = encoded["path"] if encoded["bytes"] is None else BytesIO(encoded["bytes"])
    try:
        with Image.open(source) as image:
            return _to_8_bit(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:  # damaged files lead Pillow's decoders into errors of almost every type
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def _to_8_bit(image: Image.Image) -> Image.Image:
    # Pillow's own conversion of 16 bits to 8 clips at 255. Mode I is what some decoders make of 16-bit grey.
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"grey values from {grey.min()} to {grey.max()} are not 16-bit")
        return Image.fromarray(np.round(grey / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point grey values have no defined range")
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode == "L" else image.convert("RGB")


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for one sample.

    Attributes:
        flip: Whether the image is mirrored.
        crop: Where the crop lies between left and right and between top and bottom, each in [0, 1). None is the
            centre.
    """

    flip: bool = False
    crop: tuple[float, float] | None = None


@dataclass(frozen=True)
class ImageTransform:
    """From a decoded image to a tensor: resize, crop, flip.

    Args:
        resolution: Height and width of the result.
        channels: 1 (grey) or 3 (RGB).
        center_crop: Whether to crop the middle rather than a random part.
        random_flip: Whether to mirror half of the images.

    Raises:
        ValueError: For an argument that is out of range.
    """

    resolution: int
    channels: int = 3
    center_crop: bool = False
    random_flip: bool = False

    def __post_init__(self):
        if self.resolution < 1:
            raise ValueError(f"`resolution` must be at least 1, got {self.resolution}.")
        if self.channels not in _MODES:
            raise ValueError(f"`channels` must be 1 (grey) or 3 (RGB), got {self.channels}.")

    def draw(self, generator: torch.Generator) -> Augmentation:
        """Draws a sample's augmentation. The flip does not depend on whether the crop is random."""
        flip, left, top = torch.rand(3, generator=generator).tolist()
        return Augmentation(self.random_flip and flip < 0.5, None if self.center_crop else (left, top))

    def __call__(self, image: Image.Image, augmentation: Augmentation) -> torch.Tensor:
        """Makes a tensor of an image.

        The shorter side becomes `resolution`, by bilinear interpolation with antialiasing: what torchvision's
        `Resize` does to a Pillow image. What is transparent becomes white.

        Args:
            image: Of mode L, RGB or RGBA.
            augmentation: Which crop and whether to flip.

        Returns:
            `(channels, resolution, resolution)`, float32 in [-1, 1].
        """
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        image = image.convert(_MODES[self.channels])
        short, long = sorted(image.size)
        long = int(self.resolution * long / short)
        size = (self.resolution, long) if image.width <= image.height else (long, self.resolution)
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = self._corner(size, augmentation.crop)
        image = image.crop((left, top, left + self.resolution, top + self.resolution))
        pixels = torch.from_numpy(np.array(image)).view(self.resolution, self.resolution, self.channels)
        pixels = pixels.flip(1) if augmentation.flip else pixels
        return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1).contiguous()

    def _corner(self, size: tuple[int, int], crop: tuple[float, float] | None) -> list[int]:
        room = [length - self.resolution for length in size]
        if crop is None:
            return [round(pixels / 2) for pixels in room]
        return [int(place * (pixels + 1)) for place, pixels in zip(crop, room, strict=True)]
