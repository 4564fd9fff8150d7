"""Profiles are made here: matrix and curve profiles of the ICC specification's version 2."""

import struct
from io import BytesIO

import pytest
from PIL import Image, ImageCms

from diffusers_dtr.training.data.images import decode_image, to_srgb


# Red, green and blue as XYZ under D50
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
D50 = (0.9642, 1.0, 0.8249)


def number(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def icc_profile(space: bytes = b"RGB ", gamma: float = 2.2) -> bytes:
    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78, b"wtpt": xyz(D50)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {b"rXYZ": xyz(DISPLAY_P3[0]), b"gXYZ": xyz(DISPLAY_P3[1]), b"bXYZ": xyz(DISPLAY_P3[2])}
        tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    start, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, body in tags.items():
        body += b"\0" * (-len(body) % 4)
        table += name + struct.pack(">II", start + len(data), len(body))
        data += body
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + b"".join(map(number, D50))
    return head.ljust(128, b"\0") + table + data


def decoded(image: Image.Image, file_format: str, profile: bytes) -> Image.Image:
    file = BytesIO()
    image.save(file, file_format, icc_profile=profile, **({} if file_format == "PNG" else {"quality": 100}))
    return decode_image({"bytes": file.getvalue(), "path": None})


def viewed(image: Image.Image, profile: bytes) -> Image.Image:
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_colours_of_a_wide_gamut_are_converted(file_format):
    image = Image.new("RGB", (16, 16), (230, 60, 40))
    expected = viewed(image, icc_profile()).getpixel((8, 8))
    assert max(abs(one - 230) for one in expected[:1]) > 10
    got = decoded(image, file_format, icc_profile()).getpixel((8, 8))
    assert max(abs(one - other) for one, other in zip(got, expected, strict=True)) <= 3  # lossy formats


def test_transparency_stays_as_it_is():
    image = Image.new("RGBA", (2, 2), (230, 60, 40, 77))
    expected = viewed(image.convert("RGB"), icc_profile()).getpixel((0, 0))
    assert decoded(image, "PNG", icc_profile()).getpixel((0, 0)) == (*expected, 77)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_grey_profile_is_for_grey_of_every_kind(mode):
    gray = icc_profile(b"GRAY", gamma=1.0)
    expected = viewed(Image.new("L", (2, 2), 64), gray).getpixel((0, 0))[0]
    assert expected > 120
    image = Image.new("L", (2, 2), 64)
    if mode == "I;16":
        image = image.convert("I").point(lambda value: value * 257).convert("I;16")
    got = decoded(image.convert(mode), "PNG", gray)
    assert got.getpixel((0, 0)) == ((expected,) * 3 + (255,) if mode == "LA" else expected)


def test_what_is_srgb_already_is_not_changed():
    image = Image.frombytes("RGB", (16, 16), bytes(range(256)) * 3)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decoded(image, "PNG", profile).tobytes() == image.tobytes()


@pytest.mark.parametrize("profile", [b"", b"no profile", icc_profile()[:140], icc_profile(b"GRAY")])
def test_damaged_profiles_and_those_of_other_colours_are_passed_over(profile):
    image = Image.new("RGB", (2, 2), (230, 60, 40))
    assert to_srgb(image, profile).getpixel((0, 0)) == (230, 60, 40)


def test_cmyk_becomes_rgb_with_and_without_a_profile():
    image = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    for profile in (None, icc_profile()):
        assert to_srgb(image, profile).getpixel((0, 0)) == (255, 0, 0)
