"""What holds of every image that can be drawn, whatever its size, mode, format and orientation: laws, tried on random ones."""

import io

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from clipdit.images import ImageError, decode_image, encode_image, image_size, read_image

FEW = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
MANY = settings(FEW, max_examples=2000)

SIDE = st.integers(1, 24)
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True, "exact": True}}


@st.composite
def pixels(draw, channels: int = 3) -> np.ndarray:
    """uint8 (H, W, channels)."""
    return draw(arrays.arrays(np.uint8, (draw(SIDE), draw(SIDE), channels)))


@st.composite
def files(draw) -> bytes:
    """A whole file of one of the formats that a service takes, in any mode that Pillow writes there."""
    format, mode = draw(st.sampled_from([
        ("PNG", "1"), ("PNG", "L"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "I;16"),
        ("JPEG", "L"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("WEBP", "RGBA"),
    ]))  # fmt: skip
    height, width = draw(SIDE), draw(SIDE)
    if mode == "I;16":
        image = Image.fromarray(draw(arrays.arrays(np.uint16, (height, width))))
    else:
        image = Image.fromarray(draw(arrays.arrays(np.uint8, (height, width, 4))), "RGBA")
        image = image.convert("RGB").convert(mode) if mode in ("CMYK", "1") else image.convert(mode)
    stream, options = io.BytesIO(), {}
    if draw(st.booleans()):
        exif = Image.Exif()
        exif[0x0112] = draw(st.integers(0, 9))
        options["exif"] = exif
    if format != "PNG":
        options["quality"] = draw(st.integers(1, 100))
    image.save(stream, format, **options)
    return stream.getvalue()


def check_shape(data: bytes) -> None:
    image = read_image(data)
    assert image.dtype == torch.uint8 and image.is_contiguous() and image.shape[0] == 3
    assert image_size(data) == tuple(image.shape[1:])
    assert torch.equal(image, read_image(data))


def check_round_trip(array: np.ndarray, format: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format, **LOSSLESS[format])
    image = read_image(stream.getvalue())
    assert np.array_equal(image.permute(1, 2, 0).numpy(), array)
    assert torch.equal(read_image(encode_image(image, "PNG", effort=1)), image)
    for lossy in ("JPEG", "WEBP"):
        assert read_image(encode_image(image, lossy, quality=90)).shape == image.shape


def check_transparency(array: np.ndarray) -> None:
    """Alpha over white, to the nearest level."""
    stream = io.BytesIO()
    Image.fromarray(array, "RGBA").save(stream, "PNG")
    colour, alpha = array[..., :3].astype(float), array[..., 3:].astype(float) / 255
    wanted = colour * alpha + 255 * (1 - alpha)
    image = read_image(stream.getvalue()).permute(1, 2, 0).numpy()
    assert np.abs(image - wanted).max() <= 1


def check_16_bits(array: np.ndarray) -> None:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    wanted = (array.astype(float) * 255 / 65535).round()
    assert np.array_equal(read_image(stream.getvalue())[0].numpy(), wanted)


def check_damage(data: bytes, cut: int, at: int, with_: int) -> None:
    """Cut short and with one byte changed it is read, or refused in one line."""
    broken = bytearray(data[: max(1, len(data) * cut // 100)])
    broken[at % len(broken)] ^= with_
    try:
        decoded = decode_image(bytes(broken), max_pixels=10_000, max_side=200, formats=("PNG", "JPEG", "WEBP"), animated=False)
    except ImageError as error:
        assert error.reason and "\n" not in error.reason
    else:
        assert decoded.pixels.dtype == torch.uint8 and decoded.pixels[0].numel() <= 10_000


uint16 = arrays.arrays(np.uint16, st.tuples(SIDE, SIDE))
LAWS = {
    "the header tells the size, and reading twice gives the same": (check_shape, (files(),)),
    "what was encoded without loss comes back": (check_round_trip, (pixels(), st.sampled_from(sorted(LOSSLESS)))),
    "transparency is put on white": (check_transparency, (pixels(channels=4),)),
    "16 bits are scaled and not clipped": (check_16_bits, (uint16,)),
    "damage is refused or survived": (check_damage, (files(), st.integers(1, 100), st.integers(0), st.integers(0, 255))),
}


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("law", LAWS)
def test_of_all_images(law: str, examples: settings):
    check, strategies = LAWS[law]
    examples(given(*strategies)(check))()
