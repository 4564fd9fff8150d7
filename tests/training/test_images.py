import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusers_dtr.training.config.data import INTERPOLATION_MODES
from diffusers_dtr.training.data.images import (
    Augmentation,
    ImageTransform,
    UnreadableImageError,
    decode_image,
)


def encode(image: Image.Image, file_format: str = "PNG", **options) -> dict:
    file = BytesIO()
    image.save(file, file_format, **options)
    return {"bytes": file.getvalue(), "path": None}


def to_tensor(image: Image.Image, file_format: str = "PNG", channels: int = 3, **options) -> torch.Tensor:
    transform = ImageTransform(resolution=image.height, channels=channels, center_crop=True)
    return transform(decode_image(encode(image, file_format, **options)), Augmentation())


def level(value: int) -> float:
    return value / 127.5 - 1


def noise_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_becomes_the_channels_of_the_model(mode, channels):
    pixels = to_tensor(Image.new("RGB", (4, 4), "white").convert(mode), channels=channels)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, torch.ones(channels, 4, 4))


def test_black_is_minus_one_and_channels_come_first():
    pixels = to_tensor(Image.new("RGB", (2, 2), (0, 255, 51)))
    assert pixels[:, 0, 0].tolist() == pytest.approx([-1, 1, level(51)])


def test_grey_values_of_16_bits_are_scaled():
    grey = np.array([[0, 257, 32896, 65535]] * 4, dtype=np.uint16)
    for file_format in ("PNG", "TIFF"):
        pixels = to_tensor(Image.fromarray(grey), file_format, channels=1)
        assert pixels[0, 0].tolist() == pytest.approx([-1, level(1), level(128), 1], abs=1e-6)


def png_of_16_bits(pixels: np.ndarray) -> dict:
    """A PNG of 16 bits per channel, which Pillow does not write except in grey: `(height, width, channels)`."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    data = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return {"bytes": b"\x89PNG\r\n\x1a\n" + b"".join(data), "path": None}


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_12_bit_data_in_a_file_of_16_bits_are_as_bright_as_they_are(file_format):
    grey = np.array([[0, 1024, 2048, 4095]] * 4, dtype=np.uint16)
    pixels = to_tensor(Image.fromarray(grey), file_format, channels=1)
    assert pixels[0, 0].tolist() == pytest.approx([-1, level(64), level(128), 1], abs=1e-6)


def test_a_file_that_tells_its_white_is_believed():
    grey = np.array([[0, 100]], dtype=">u2").tobytes()
    for white, expected in ((300, 85), (400, 64), (65535, 0)):
        image = decode_image({"bytes": b"P5\n2 1\n%d\n" % white + grey, "path": None})
        assert image.getpixel((1, 0)) == expected


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_12_bit_colours_in_a_file_of_16_bits_are_refused(channels):
    values = np.full((2, 2, channels), 3000)
    with pytest.raises(UnreadableImageError, match="none is above 4095"):
        decode_image(png_of_16_bits(values))
    decode_image(png_of_16_bits(values * 16))
    decode_image(png_of_16_bits(values * 0))


def test_grey_of_16_bits_keeps_its_transparency():
    grey = np.array([[0, 257, 65535, 257]] * 4, dtype=np.uint16)
    pixels = to_tensor(Image.fromarray(grey), channels=1, transparency=257)
    assert pixels[0, 0].tolist() == pytest.approx([-1, 1, 1, 1])
    both = np.stack([np.full((2, 2), 65535 // 2), np.array([[0, 65535]] * 2)], axis=-1)
    image = decode_image(png_of_16_bits(both))
    assert (image.mode, image.getpixel((0, 0)), image.getpixel((1, 0))) == (
        "RGBA",
        (127,) * 3 + (0,),
        (127,) * 3 + (255,),
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    options = {}
    if mode == "P":
        image, options = Image.new("P", (4, 4), 0), {"transparency": 0}
    assert torch.equal(to_tensor(image if mode == "P" else image.convert(mode), **options), torch.ones(3, 4, 4))


def test_what_is_half_transparent_is_mixed_with_white():
    pixels = to_tensor(Image.new("RGBA", (2, 2), (0, 255, 0, 51)), channels=3)
    assert pixels[:, 0, 0].tolist() == pytest.approx([level(204), 1, level(204)])


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (6, 4), "black")
    image.paste("white", (0, 0, 6, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: to be turned clockwise
    upright = decode_image(encode(image, exif=exif))
    assert upright.size == (4, 6)
    assert upright.getpixel((0, 3)) == (0, 0, 0)
    assert upright.getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: b"not an image", lambda data: data[:200], lambda data: data[:30]]
)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_damaged_images_are_unreadable(file_format, damage):
    data = encode(noise_image(40, 40), file_format)["bytes"]
    with pytest.raises(UnreadableImageError):
        decode_image({"bytes": damage(data), "path": None})


def test_memory_that_does_not_suffice_is_no_damage(monkeypatch):
    def exhausted(source):
        raise MemoryError

    monkeypatch.setattr(Image, "open", exhausted)
    with pytest.raises(MemoryError):
        decode_image({"bytes": b"", "path": None})


def test_missing_images_are_unreadable(tmp_path):
    with pytest.raises(UnreadableImageError, match="none"):
        decode_image(None)
    with pytest.raises(UnreadableImageError, match="FileNotFoundError"):
        decode_image({"bytes": None, "path": str(tmp_path / "gone.png")})


@pytest.mark.parametrize(
    "values", [np.full((2, 2), 0.5, np.float32), np.full((2, 2), 70000, np.int32), np.full((2, 2), -1, np.int32)]
)
def test_grey_values_without_a_defined_range_are_unreadable(values):
    with pytest.raises(UnreadableImageError):
        decode_image(encode(Image.fromarray(values), "TIFF"))


def test_resizing_is_bilinear_with_antialiasing_on_the_shorter_side():
    image = noise_image(31, 20)
    resized = np.asarray(image.resize((15, 10), Image.Resampling.BILINEAR))  # 15 = int(31 * 10 / 20)
    expected = torch.from_numpy(resized[:, 2:12].copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(ImageTransform(10)(image, Augmentation()), expected)


@pytest.mark.parametrize("size", [(3, 400), (400, 3), (20, 500)])
@pytest.mark.parametrize("crop", [None, (0.0, 0.0), (0.4, 0.7), (0.999, 0.999)])
def test_of_a_long_image_the_crop_is_the_same_as_of_the_whole_resized(size, crop):
    image, transform = noise_image(*size), ImageTransform(16)
    long = int(16 * max(size) / min(size))
    whole = image.resize((16, long) if size[0] < size[1] else (long, 16), Image.Resampling.BILINEAR)
    left, top = transform._corner(whole.size, crop)
    expected = torch.from_numpy(np.array(whole.crop((left, top, left + 16, top + 16)))).permute(2, 0, 1)
    pixels = (transform(image, Augmentation(crop=crop)) + 1) * 127.5
    assert (pixels - expected).abs().max() <= 1.01


def test_a_very_long_image_is_never_resized_as_a_whole(monkeypatch):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, size, *rest, **o: sizes.append(size) or resize(image, size, *rest, **o)
    )
    assert ImageTransform(64)(Image.new("RGB", (1, 10000)), Augmentation()).shape == (3, 64, 64)
    assert sizes == [(64, 64)]


@pytest.mark.parametrize("mode", INTERPOLATION_MODES)
def test_every_interpolation_mode_is_pillows(mode):
    image = noise_image(20, 20)
    expected = np.array(image.resize((10, 10), Image.Resampling[mode.upper()]))
    pixels = ImageTransform(10, interpolation=mode)(image, Augmentation())
    assert np.array_equal(((pixels + 1) * 127.5).round().permute(1, 2, 0).numpy(), expected)


def test_random_crops_reach_every_position_equally_often():
    ramp = Image.fromarray(np.tile(np.arange(6, dtype=np.uint8), (3, 1)))
    transform = ImageTransform(3, channels=1)
    generator = torch.Generator().manual_seed(0)
    lefts = [round((float(transform(ramp, transform.draw(generator))[0, 0, 0]) + 1) * 127.5) for _ in range(400)]
    assert set(lefts) == {0, 1, 2, 3}
    assert min(lefts.count(left) for left in range(4)) > 70


@pytest.mark.parametrize(("length", "left"), [(4, 0), (5, 1), (6, 2), (7, 2)])
def test_middle_is_where_torchvision_has_it(length, left):
    ramp = Image.fromarray(np.tile(np.arange(length, dtype=np.uint8), (3, 1)))
    pixels = ImageTransform(3, channels=1)(ramp, Augmentation())
    assert round((float(pixels[0, 0, 0]) + 1) * 127.5) == left


def test_flipping_mirrors_what_was_cropped():
    image, transform = noise_image(12, 8), ImageTransform(8)
    plain, flipped = (transform(image, Augmentation(flip, crop=(0.3, 0.3))) for flip in (False, True))
    assert torch.equal(flipped, plain.flip(-1))


@given(st.integers(0, 2**32))
def test_flips_are_the_same_with_and_without_random_crops(seed):
    center, random = ImageTransform(8, center_crop=True, random_flip=True), ImageTransform(8, random_flip=True)
    draws = [transform.draw(torch.Generator().manual_seed(seed)) for transform in (center, random)]
    assert draws[0].flip == draws[1].flip
    assert draws[0].crop is None
    assert draws[1].crop is not None


def test_half_of_the_images_are_flipped_if_any():
    generator = torch.Generator().manual_seed(0)
    flips = [ImageTransform(8, random_flip=True).draw(generator).flip for _ in range(400)]
    assert 160 < sum(flips) < 240
    assert not any(ImageTransform(8).draw(generator).flip for _ in range(20))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(40, 20), (20, 40)])
def test_micro_conditions_are_the_size_before_and_the_corner_of_the_crop_after_resizing(size, flip):
    width, height = size
    # Every pixel tells its column and its row.
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))
    image = image if not flip else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    transform, augmentation = ImageTransform(resolution=20), Augmentation(flip=flip, crop=(0.3, 0.3))
    pixels, told = transform(image, augmentation), transform.micro_conditions(size, augmentation)
    assert told["original_size"].tolist() == [height, width]
    left, top = ((pixels[:2, 0, 0] + 1) * 127.5).round().int().tolist()
    assert told["crop_top_left"].tolist() == [top, left]
