"""From an encoded image of whatever kind to a tensor: decode with Pillow, convert to sRGB, resize, crop, flip."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from io import BytesIO
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps


logger = logging.getLogger(__name__)

_MODES = {1: "L", 3: "RGB"}
_COLOR_SPACES = {"L": "GRAY", "RGB": "RGB", "RGBA": "RGB", "CMYK": "CMYK"}
# Resized as a whole up to this ratio of sides, as torchvision does; of longer images only what the crop shows.
_MAX_WHOLE_RATIO = 4
_MAX_12_BIT, _MAX_16_BIT = 2**12 - 1, 2**16 - 1
# Their files tell the value of white, and Pillow scales it to that of 16 bits.
_SCALED_FORMATS = ("PPM", "JPEG2000")


class UnreadableImageError(ValueError):
    """An image is truncated, missing or not an image, or its values have no defined range."""


def decode_image(encoded: Mapping[str, bytes | str | None] | None) -> Image.Image:
    """Decodes a row of an undecoded image column of 🤗 datasets, and turns the image upright, as its EXIF data tell.

    The result is of mode L, RGB or RGBA, in sRGB: an embedded ICC profile is converted. Grey values of 16 bits are
    scaled to 8; a file in which none is above 4095 holds 12 bits.
    """
    return decode_frames(_source(encoded), [0])[0]


def upright_size(encoded: Mapping[str, bytes | str | None] | None) -> tuple[int, int]:
    """Width and height of what [`decode_image`] returns, of which no pixel is decoded."""
    with decoding(), Image.open(_source(encoded)) as image:
        # PNG's own method decodes the image, in case that what turns it comes after the pixels. TIFF has its size so.
        turn = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return image.size[::-1] if turn in (5, 6, 7, 8) and image.format != "TIFF" else image.size


def _source(encoded: Mapping[str, bytes | str | None] | None) -> str | BinaryIO:
    if encoded is None or (encoded["path"] is None and encoded["bytes"] is None):
        raise UnreadableImageError("the row has none")
    return encoded["path"] if encoded["bytes"] is None else BytesIO(encoded["bytes"])


def decode_frames(source: str | os.PathLike | BinaryIO, numbers: Sequence[int]) -> list[Image.Image]:
    """Decodes frames, by ascending numbers, of a file that may have several, each as [`decode_image`] does."""
    frames = []
    with decoding(), Image.open(source) as image:
        for number in numbers:
            if number:  # formats with one frame need not seek
                image.seek(number)
            layout, scaled = str(image.tile), image.format in _SCALED_FORMATS  # before loading, which forgets them
            frames.append(_to_8_bit(ImageOps.exif_transpose(image), layout, scaled))
    return frames


@contextmanager
def decoding(prefix: str = "") -> Iterator[None]:
    """Around what decodes a file: any error but those of memory becomes an [`UnreadableImageError`]."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # damaged files lead decoders into errors of almost every type
        kind = "" if isinstance(error, UnreadableImageError) else f"{type(error).__name__}: "
        raise UnreadableImageError(f"{prefix}{kind}{error}") from error


def _to_8_bit(image: Image.Image, layout: str, scaled: bool) -> Image.Image:
    """An image of mode L, RGB or RGBA, in sRGB, from a file with this `layout` of pixels, in Pillow's words."""
    profile = image.info.get("icc_profile")
    # Mode I is what some decoders make of 16-bit grey.
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey, alpha = _grey_of_16_bits(image, scaled)
    elif image.mode == "F":
        raise ValueError("floating-point grey values have no defined range")
    elif image.mode in ("LA", "La") or "LA;16" in layout or (image.mode == "L" and image.has_transparency_data):
        grey, alpha = _checked(image.convert("LA"), layout).split()
    elif image.mode in ("L", "CMYK"):
        return to_srgb(image, profile)
    else:
        mode = "RGBA" if image.has_transparency_data else "RGB"
        return to_srgb(_checked(image.convert(mode), layout), profile)
    grey = to_srgb(grey, profile)
    return grey if alpha is None else Image.merge("RGBA", (grey, grey, grey, alpha))


def _grey_of_16_bits(image: Image.Image, scaled: bool) -> tuple[Image.Image, Image.Image | None]:
    """Grey of 8 bits, and what is opaque of it. Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > _MAX_16_BIT:
        raise ValueError(f"grey values from {values.min()} to {values.max()} are not 16-bit")
    white = _MAX_16_BIT
    if not scaled and 0 < values.max() <= _MAX_12_BIT:
        _say_once("Grey images of 16 bits without a value above 4095 are taken for 12-bit data: 4095 is white.")
        white = _MAX_12_BIT
    grey = Image.fromarray(np.round(values * 255 / white).astype(np.uint8))
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return grey, alpha


def _checked(image: Image.Image, layout: str) -> Image.Image:
    """Refuse 12-bit values in a file of 16 bits that Pillow reads as 8, dropping the lower half."""
    bands = [band for band in image.getbands() if band != "A"]
    if ";16" in layout and 0 < max(image.getchannel(band).getextrema()[1] for band in bands) <= _MAX_12_BIT >> 8:
        raise ValueError("the values are of 16 bits, but none is above 4095; if they are of 12, multiply them by 16")
    return image


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts an image of mode L, RGB, RGBA or CMYK from the colour space of an ICC profile to sRGB.

    Without a profile, or with one that is damaged or of other colours than the image's (an RGB profile in a grey
    image), the numbers are taken for sRGB, as browsers do.
    """
    transform = None if profile is None else _srgb_transform(profile, image.mode)
    mode = "RGB" if image.mode == "CMYK" else image.mode
    return (image if transform is None else ImageCms.applyTransform(image, transform)).convert(mode)


@lru_cache(maxsize=64)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform to sRGB, or None if there is nothing to convert."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if source.profile.xcolor_space.strip() != _COLOR_SPACES[mode]:
            return None
        output = "RGBA" if mode == "RGBA" else "RGB"
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, output)
    except (OSError, ImageCms.PyCMSError) as error:
        logger.warning("A damaged ICC profile is passed over, and its images are taken for sRGB: %s", error)
        return None
    if mode == "CMYK":
        return transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    colors = levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    before = Image.fromarray(colors).convert(mode)
    after = ImageCms.applyTransform(before, transform).convert(mode)
    # A profile that moves no colour by more than rounding is sRGB, of which there are many, and changes nothing.
    return None if np.abs(np.subtract(before, after, dtype=int)).max() <= 1 else transform


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for one sample: whether it is mirrored, and in [0, 1) where its crop lies and its clip starts.

    A `crop` lies between left and right and between top and bottom; without it and `start`, both are in the middle.
    """

    flip: bool = False
    crop: tuple[float, float] | None = None
    start: float | None = None


@dataclass(frozen=True)
class ImageTransform:
    """From a decoded image to a tensor of 1 (grey) or 3 (RGB) channels: resize, crop, flip.

    The `resolution` is the side of a square, or height and width.
    """

    resolution: int | tuple[int, int]
    channels: int = 3
    center_crop: bool = False
    random_flip: bool = False
    interpolation: str = "bilinear"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the result, as Pillow has them."""
        return (self.resolution,) * 2 if isinstance(self.resolution, int) else self.resolution[::-1]

    def draw(self, generator: torch.Generator) -> Augmentation:
        """Draws a sample's augmentation. The flip does not depend on whether the crop is random."""
        flip, left, top = torch.rand(3, generator=generator).tolist()
        return Augmentation(self.random_flip and flip < 0.5, None if self.center_crop else (left, top))

    def micro_conditions(self, size: tuple[int, int], augmentation: Augmentation) -> dict[str, torch.Tensor]:
        """What Stable Diffusion XL is told of an image's past; `size` is its width and height.

        `original_size`, height and width, and `crop_top_left`, how many of the resized image's rows and columns lie
        before the crop, in the mirrored image if it is mirrored; `target_size`, that of the crop; `(2,)` each.
        """
        resized = self._resized(size)
        left, top = self._corner(resized, augmentation.crop)
        left = resized[0] - self.size[0] - left if augmentation.flip else left
        sizes = {"original_size": size[::-1], "crop_top_left": (top, left), "target_size": self.size[::-1]}
        return {name: torch.tensor(values) for name, values in sizes.items()}

    def __call__(self, image: Image.Image, augmentation: Augmentation) -> torch.Tensor:
        """Makes a tensor `(channels, height, width)`, float32 in [-1, 1], of an L, RGB or RGBA image.

        Of a square, the shorter side becomes `resolution`, with antialiasing: what torchvision's `Resize` does to a
        Pillow image; else the image becomes as small as covers height and width. What is transparent becomes white.
        """
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        image = self._resize_and_crop(image.convert(_MODES[self.channels]), augmentation.crop)
        pixels = torch.from_numpy(np.array(image)).view(*self.size[::-1], self.channels)
        pixels = pixels.flip(1) if augmentation.flip else pixels
        return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1).contiguous()

    def _resize_and_crop(self, image: Image.Image, crop: tuple[float, float] | None) -> Image.Image:
        size = self._resized(image.size)
        mode = Image.Resampling[self.interpolation.upper()]
        corner = self._corner(size, crop)
        box = [*corner, *(start + side for start, side in zip(corner, self.size, strict=True))]
        if all(long <= _MAX_WHOLE_RATIO * side for long, side in zip(size, self.size, strict=True)):
            return image.resize(size, mode).crop(box)
        # A 1×10 000 image would become one of 512×5 120 000. The part has the same pixels, up to rounding.
        scales = [before / after for before, after in zip(image.size, size, strict=True)] * 2
        part = [min(place * scale, end) for place, scale, end in zip(box, scales, image.size * 2, strict=True)]
        return image.resize(self.size, mode, box=part)

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        (width, height), (before_width, before_height) = self.size, size
        if width * before_height >= height * before_width:
            return width, width * before_height // before_width
        return height * before_width // before_height, height

    def _corner(self, size: tuple[int, int], crop: tuple[float, float] | None) -> list[int]:
        room = [length - side for length, side in zip(size, self.size, strict=True)]
        if crop is None:
            return [round(pixels / 2) for pixels in room]
        return [int(place * (pixels + 1)) for place, pixels in zip(crop, room, strict=True)]
