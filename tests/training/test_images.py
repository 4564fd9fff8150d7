import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from diffusers_dtr.training.config.data import INTERPOLATION_MODES
from diffusers_dtr.training.data.images import (
    Augmentation,
    ImageTransform,
    UnreadableImageError,
    decode_image,
    to_srgb,
)


def decoded(image: Image.Image, file_format: str = "PNG", **options) -> Image.Image:
    file = BytesIO()
    image.save(file, file_format, **options)
    return decode_bytes(file.getvalue())


def decode_bytes(data: bytes) -> Image.Image:
    return decode_image({"bytes": data, "path": None})


def to_tensor(image: Image.Image, file_format: str = "PNG", channels: int = 3, **options) -> torch.Tensor:
    transform = ImageTransform(resolution=image.height, channels=channels, center_crop=True)
    return transform(decoded(image, file_format, **options), Augmentation())


def level(value: int) -> float:
    return value / 127.5 - 1


def values(pixels: torch.Tensor) -> np.ndarray:
    """From a tensor back to `(height, width, channels)` in [0, 255]."""
    return ((pixels + 1) * 127.5).round().int().permute(1, 2, 0).numpy()


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ramp(length: int) -> Image.Image:
    return Image.fromarray(np.tile(np.arange(length, dtype=np.uint8), (3, 1)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_becomes_the_channels_of_the_model(mode, channels):
    pixels = to_tensor(Image.new("RGB", (4, 4), "white").convert(mode), channels=channels)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, torch.ones(channels, 4, 4))


@pytest.mark.parametrize(("alpha", "expected"), [(255, [-1, 1, level(51)]), (51, [level(204), 1, level(214)])])
def test_black_is_minus_one_and_what_is_half_transparent_is_mixed_with_white(alpha, expected):
    pixels = to_tensor(Image.new("RGBA", (2, 2), (0, 255, 51, alpha)))
    assert pixels[:, 0, 0].tolist() == pytest.approx(expected)


# ---- 16 bits


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits per channel, which Pillow does not write except in grey: `(height, width, channels)`."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = [struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("grey", [[0, 257, 32896, 65535], [0, 16, 2056, 4095]], ids=["16 bits", "12 bits"])
def test_grey_values_of_16_or_12_bits_are_scaled(grey, file_format):
    pixels = to_tensor(Image.fromarray(np.array([grey] * 4, dtype=np.uint16)), file_format, channels=1)
    assert pixels[0, 0].tolist() == pytest.approx([-1, level(1), level(128), 1], abs=1e-6)


def test_a_file_that_tells_its_white_is_believed():
    grey = np.array([[0, 100]], dtype=">u2").tobytes()
    for white, expected in ((300, 85), (400, 64), (65535, 0)):
        assert decode_bytes(b"P5\n2 1\n%d\n" % white + grey).getpixel((1, 0)) == expected


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_12_bit_colours_in_a_file_of_16_bits_are_refused(channels):
    pixels = np.full((2, 2, channels), 3000)
    with pytest.raises(UnreadableImageError, match="none is above 4095"):
        decode_bytes(png_of_16_bits(pixels))
    decode_bytes(png_of_16_bits(pixels * 16))
    decode_bytes(png_of_16_bits(pixels * 0))


def test_grey_of_16_bits_keeps_its_transparency():
    grey = np.array([[0, 257, 65535, 257]] * 4, dtype=np.uint16)
    pixels = to_tensor(Image.fromarray(grey), channels=1, transparency=257)
    assert pixels[0, 0].tolist() == pytest.approx([-1, 1, 1, 1])
    both = np.stack([np.full((2, 2), 65535 // 2), np.array([[0, 65535]] * 2)], axis=-1)
    image = decode_bytes(png_of_16_bits(both))
    assert [image.getpixel((column, 0)) for column in range(2)] == [(127, 127, 127, 0), (127, 127, 127, 255)]


@pytest.mark.parametrize(("value", "dtype"), [(0.5, np.float32), (70000, np.int32), (-1, np.int32)])
def test_grey_values_without_a_defined_range_are_unreadable(value, dtype):
    with pytest.raises(UnreadableImageError):
        decoded(Image.fromarray(np.full((2, 2), value, dtype)), "TIFF")


# ---- transparency, orientation, damage


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode):
    image, options = Image.new("RGBA", (4, 4), (0, 0, 0, 0)), {}
    if mode == "P":
        image, options = Image.new("P", (4, 4), 0), {"transparency": 0}
    assert torch.equal(to_tensor(image.convert(mode), **options), torch.ones(3, 4, 4))


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (6, 4), "black")
    image.paste("white", (0, 0, 6, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: to be turned clockwise
    upright = decoded(image, exif=exif)
    assert upright.size == (4, 6)
    assert (upright.getpixel((0, 3)), upright.getpixel((3, 3))) == ((0, 0, 0), (255, 255, 255))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_damaged_images_are_unreadable(file_format):
    file = BytesIO()
    noise_image(40, 40).save(file, file_format)
    for data in (b"", b"not an image", file.getvalue()[:200], file.getvalue()[:30]):
        with pytest.raises(UnreadableImageError):
            decode_bytes(data)


def test_memory_that_does_not_suffice_is_no_damage(monkeypatch):
    def exhausted(source):
        raise MemoryError

    monkeypatch.setattr(Image, "open", exhausted)
    with pytest.raises(MemoryError):
        decode_bytes(b"")


def test_missing_images_are_unreadable(tmp_path):
    with pytest.raises(UnreadableImageError, match="none"):
        decode_image(None)
    with pytest.raises(UnreadableImageError, match="none"):
        decode_image({"bytes": None, "path": None})
    with pytest.raises(UnreadableImageError, match="FileNotFoundError"):
        decode_image({"bytes": None, "path": str(tmp_path / "gone.png")})


# ---- colour profiles


def icc_profile(space: bytes = b"RGB ", gamma: float = 2.2) -> bytes:
    """A matrix and curve profile of the ICC specification's version 2, with the primaries of Display P3."""

    def numbers(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    d50, xyz = numbers(0.9642, 1.0, 0.8249), b"XYZ \0\0\0\0"
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78, b"wtpt": xyz + d50}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {b"rXYZ": xyz + numbers(0.51512, 0.24120, -0.00105), b"gXYZ": xyz + numbers(0.29198, 0.69225, 0.04189)}
        tags |= {b"bXYZ": xyz + numbers(0.15710, 0.06657, 0.78407), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    start, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, body in tags.items():
        body += b"\0" * (-len(body) % 4)
        table += name + struct.pack(">II", start + len(data), len(body))
        data += body
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + d50
    return head.ljust(128, b"\0") + table + data


def viewed(image: Image.Image, profile: bytes) -> tuple[int, int, int]:
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB").getpixel((0, 0))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_colours_of_a_wide_gamut_are_converted_and_transparency_is_not(file_format):
    image = Image.new("RGB", (16, 16), (230, 60, 40))
    expected = viewed(image, icc_profile())
    assert abs(expected[0] - 230) > 10
    options = {} if file_format == "PNG" else {"quality": 100}
    got = decoded(image, file_format, icc_profile=icc_profile(), **options).getpixel((8, 8))
    assert np.abs(np.subtract(got, expected)).max() <= 3  # lossy formats
    image.putalpha(77)
    assert decoded(image, icc_profile=icc_profile()).getpixel((0, 0)) == (*expected, 77)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_grey_profile_is_for_grey_of_every_kind(mode):
    gray, image = icc_profile(b"GRAY", gamma=1.0), Image.new("L", (2, 2), 64)
    expected = viewed(image, gray)[0]
    assert expected > 120
    if mode == "I;16":
        image = image.convert("I").point(lambda value: value * 257)
    got = decoded(image.convert(mode), icc_profile=gray).getpixel((0, 0))
    assert got == ((expected,) * 3 + (255,) if mode == "LA" else expected)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("profile", [b"", b"no profile", icc_profile()[:140], icc_profile(b"GRAY"), SRGB])
def test_what_is_srgb_already_or_not_known_is_not_changed(profile):
    image = Image.frombytes("RGB", (16, 16), bytes(range(256)) * 3)
    assert to_srgb(image, profile).tobytes() == image.tobytes()


def test_cmyk_becomes_rgb_with_and_without_a_profile():
    image = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    for profile in (None, icc_profile()):
        assert to_srgb(image, profile).getpixel((0, 0)) == (255, 0, 0)


# ---- resizing, crops and flips


@pytest.mark.parametrize("mode", INTERPOLATION_MODES)
def test_resizing_is_pillows_on_the_shorter_side(mode):
    image = noise_image(31, 20)
    resized = np.asarray(image.resize((15, 10), Image.Resampling[mode.upper()]))  # 15 = int(31 * 10 / 20)
    pixels = ImageTransform(10, interpolation=mode)(image, Augmentation())
    assert np.array_equal(values(pixels), resized[:, 2:12])


@pytest.mark.parametrize("size", [(3, 400), (400, 3), (20, 500)])
@pytest.mark.parametrize("crop", [None, (0.0, 0.0), (0.4, 0.7), (0.999, 0.999)])
def test_of_a_long_image_the_crop_is_the_same_as_of_the_whole_resized(size, crop):
    image, transform = noise_image(*size), ImageTransform(16)
    long = int(16 * max(size) / min(size))
    whole = image.resize((16, long) if size[0] < size[1] else (long, 16), Image.Resampling.BILINEAR)
    left, top = transform._corner(whole.size, crop)
    expected = np.asarray(whole.crop((left, top, left + 16, top + 16)), dtype=int)
    assert np.abs(values(transform(image, Augmentation(crop=crop))) - expected).max() <= 1


def test_a_very_long_image_is_never_resized_as_a_whole(monkeypatch):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, size, *rest, **o: sizes.append(size) or resize(image, size, *rest, **o)
    )
    assert ImageTransform(64)(Image.new("RGB", (1, 10000)), Augmentation()).shape == (3, 64, 64)
    assert sizes == [(64, 64)]


def test_random_crops_reach_every_position_equally_often():
    transform, generator = ImageTransform(3, channels=1), torch.Generator().manual_seed(0)
    lefts = [values(transform(ramp(6), transform.draw(generator)))[0, 0, 0] for _ in range(400)]
    assert set(lefts) == {0, 1, 2, 3}
    assert min(lefts.count(left) for left in range(4)) > 70


@pytest.mark.parametrize(("length", "left"), [(4, 0), (5, 1), (6, 2), (7, 2)])
def test_middle_is_where_torchvision_has_it(length, left):
    assert values(ImageTransform(3, channels=1)(ramp(length), Augmentation()))[0, 0, 0] == left


def test_half_of_the_images_are_flipped_if_any_whether_crops_are_random_or_not():
    center, random = ImageTransform(8, center_crop=True, random_flip=True), ImageTransform(8, random_flip=True)
    draws = [[one.draw(torch.Generator().manual_seed(seed)) for seed in range(400)] for one in (center, random)]
    flips, others = ([draw.flip for draw in some] for some in draws)
    assert flips == others
    assert 160 < sum(flips) < 240
    assert {draw.crop for draw in draws[0]} == {None}
    assert None not in {draw.crop for draw in draws[1]}
    assert not any(ImageTransform(8).draw(torch.Generator().manual_seed(seed)).flip for seed in range(20))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(40, 20), (20, 40)])
def test_micro_conditions_are_the_size_before_and_the_corner_of_the_crop_after_resizing(size, flip):
    width, height = size
    # Every pixel tells its column and its row.
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))
    image = image if not flip else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    transform, augmentation = ImageTransform(resolution=20), Augmentation(flip=flip, crop=(0.3, 0.3))
    told = transform.micro_conditions(size, augmentation)
    left, top, _ = values(transform(image, augmentation))[0, 0]
    assert told["original_size"].tolist() == [height, width]
    assert told["crop_top_left"].tolist() == [top, left]
