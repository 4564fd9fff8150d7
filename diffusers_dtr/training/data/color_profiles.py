"""What an image's numbers mean: embedded ICC profiles converted to sRGB, which all training images are in."""

from __future__ import annotations

import logging
from functools import lru_cache
from io import BytesIO

from PIL import Image, ImageCms


logger = logging.getLogger(__name__)

_COLOR_SPACES = {"L": "GRAY", "RGB": "RGB", "RGBA": "RGB", "CMYK": "CMYK"}
# A profile that moves no colour by more than this is sRGB, of which there are many, and changes nothing.
_ROUNDING = 1


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts an image of mode L, RGB, RGBA or CMYK from the colour space of an ICC profile to sRGB.

    Without a profile, or with one that is damaged or of other colours than the image's (an RGB profile in a grey
    image), the numbers are taken for sRGB, as browsers do.
    """
    mode = "RGB" if image.mode == "CMYK" else image.mode
    transform = None if profile is None else _transform(profile, image.mode)
    if transform is None:
        return image.convert(mode)
    return ImageCms.applyTransform(image, transform).convert(mode)


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
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
    return None if mode != "CMYK" and _changes_nothing(transform, mode) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    levels = range(0, 256, 15)
    if mode == "L":
        colors = bytes(levels)
    else:
        colors = bytes(value for r in levels for g in levels for b in levels for value in (r, g, b, 255)[: len(mode)])
    before = Image.frombytes(mode, (len(colors) // len(mode), 1), colors)
    after = ImageCms.applyTransform(before, transform).convert(mode)
    return all(abs(one - other) <= _ROUNDING for one, other in zip(colors, after.tobytes(), strict=True))
