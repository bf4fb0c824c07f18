import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipdit.images import ImageError, decode_image, image_size, looks_like_image, read_image

SMOOTH = 4  # mean error of a lossy format on the smooth test picture, levels
PALETTE = 20  # likewise of 16 colours


def test_every_odd_file_is_read_or_refused_with_its_reason(odd_images):
    assert len(odd_images.expected) >= 80
    wrong = {}
    for name, expected in odd_images.expected.items():
        try:
            pixels = read_image(odd_images.folder / name)
            outcome = "ok" if pixels.dtype == torch.uint8 and pixels.shape[0] == 3 else f"{pixels.dtype} {tuple(pixels.shape)}"
        except ImageError as error:
            outcome = error.reason
            assert error.path == odd_images.folder / name and "\n" not in str(error) and name in str(error)
        if (outcome == "ok") != (expected == "ok") or expected not in outcome:
            wrong[name] = outcome
    assert not wrong


def test_bytes_and_file_give_the_same(odd_images):
    for name, expected in odd_images.expected.items():
        path = odd_images.folder / name
        if expected == "ok":
            assert torch.equal(read_image(path.read_bytes()), read_image(path)), name


def test_header_tells_the_size_that_reading_gives(odd_images):
    for name, expected in odd_images.expected.items():
        if expected == "ok":
            assert image_size(odd_images.folder / name) == tuple(read_image(odd_images.folder / name).shape[-2:]), name


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("plain.bmp", 0),
        ("plain.ppm", 0),
        ("plain.tga", 0),
        ("plain.tif", 0),
        ("rgb16.png", 0),
        ("exif_garbage.jpg", SMOOTH),
        ("icc_garbage.png", 0),
        ("jpeg_named.png", SMOOTH),
        ("png_named.jpg", 0),
        ("progressive.jpg", SMOOTH),
        ("plain.webp", SMOOTH),
        ("ycbcr.tif", 2),
        ("cmyk.tif", 1),
        ("cmyk.jpg", SMOOTH),
        ("palette.png", PALETTE),
        ("animated.png", 0),
        ("animated.webp", SMOOTH),
        ("animated.gif", PALETTE),
        ("pages.tif", 0),
    ],
)
def test_formats_agree_on_the_picture(odd_images, name, tolerance):
    expected = read_image(odd_images.folder / "plain.png").int()
    assert (read_image(odd_images.folder / name).int() - expected).abs().float().mean() <= tolerance


@pytest.mark.parametrize("name", ["grey16.png", "grey16.tif", "int32.tif", "float_0_to_1.tif", "float_0_to_255.tif"])
def test_deep_grey_keeps_its_brightness(odd_images, name):
    assert torch.equal(read_image(odd_images.folder / name), read_image(odd_images.folder / "grey.png"))


def test_transparency_is_put_on_white(odd_images):
    rgb = read_image(odd_images.folder / "plain.png").double()
    alpha = read_image(odd_images.folder / "grey.png").double() / 255
    on_white = rgb * alpha + 255 * (1 - alpha)
    for name in ("rgba.png", "rgba.webp"):
        assert (read_image(odd_images.folder / name) - on_white).abs().max() <= 1.5, name
    key = read_image(odd_images.folder / "rgb_transparent_colour.png")
    assert key[:, 0, -1].tolist() == [255, 0, 0]  # opaque
    blue = (rgb == torch.tensor([0.0, 0, 255])[:, None, None]).all(0)
    assert blue.any() and (key[:, blue] == 255).all()


def test_exif_turns_the_picture_upright(odd_images):
    plain = read_image(odd_images.folder / "plain.png").int()
    turned = read_image(odd_images.folder / "exif_turned.jpg").int()  # 6: the camera was turned, rotate clockwise
    assert (turned - torch.rot90(plain, -1, (1, 2))).abs().float().mean() <= SMOOTH
    assert torch.equal(read_image(odd_images.folder / "exif_mirrored.png").int(), plain.flip(-1))


def test_lab_grey_is_grey(odd_images):
    pixels = read_image(odd_images.folder / "lab.tif").int()  # L = 128 of 255 is 50.2 %: sRGB 119
    assert (pixels - 119).abs().max() <= 1


def test_wide_gamut_colours_become_srgb(tmp_path):
    profile, to_xyz = display_p3()
    colour = np.array([200, 100, 120])
    path = tmp_path / "p3.png"
    Image.new("RGB", (4, 4), tuple(colour.tolist())).save(path, icc_profile=profile)

    srgb_to_xyz = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])  # D50, as in ICC
    linear = np.linalg.inv(srgb_to_xyz) @ to_xyz @ (colour / 255) ** 2.2
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    decoded = decode_image(path)
    assert np.abs(decoded.pixels[:, 0, 0].numpy() - expected).max() <= 2
    assert decoded.pixels[0, 0, 0] > 210  # without the profile: 200
    assert decoded.notes == ("colours converted from Test P3 to sRGB",)


def test_notes_tell_what_was_converted(odd_images):
    def notes(name):
        return decode_image(odd_images.folder / name).notes

    assert notes("plain.png") == ()
    assert notes("animated.gif") == ("first of 3 frames",)
    assert notes("grey16.png") == ("16 bits reduced to 8",)
    assert notes("rgba.png") == ("transparency put on white",)


def test_limit_of_pixels_is_the_callers(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (20, 10)).save(path)
    assert read_image(path, max_pixels=200).shape == (3, 10, 20)
    with pytest.raises(ImageError, match=r"is 20 x 10, more than 0\.000199 million pixels"):
        read_image(path, max_pixels=199)


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for path, reason in (
        (tmp_path / "folder.png", "is a folder"),
        (tmp_path / "none.png", "does not exist"),
        (Path("a\0b"), "cannot"),
    ):
        with pytest.raises(ImageError) as caught:
            read_image(path)
        assert reason in caught.value.reason


def test_error_survives_a_worker_process():
    error = pickle.loads(pickle.dumps(ImageError("is empty", Path("a.png"))))
    assert (str(error), error.reason, error.path) == ("a.png: is empty", "is empty", Path("a.png"))


def test_images_are_known_by_name_or_first_bytes(odd_images, tmp_path):
    assert all(looks_like_image(odd_images.folder / name) for name in odd_images.expected)
    for name in ("README.md", "pairs.csv", "no_suffix"):
        (tmp_path / name).write_text("text")
        assert not looks_like_image(tmp_path / name)
    assert not looks_like_image(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("cut.png", "damaged"),
        ("only_a_header.jpg", "damaged"),
        ("empty.png", "empty"),
        ("text.png", "format"),
        ("document.pdf", "format"),
        ("bomb.png", "large"),
        ("bomb_declared.png", "large"),
    ],
)
def test_a_program_learns_what_is_wrong(odd_images, name: str, fault: str):
    for source in (odd_images.folder / name, (odd_images.folder / name).read_bytes()):
        with pytest.raises(ImageError) as caught:
            read_image(source)
        assert caught.value.fault == fault
        assert pickle.loads(pickle.dumps(caught.value)).fault == fault


def test_only_the_formats_that_were_asked_for_are_opened(odd_images):
    taken = ("PNG", "JPEG")
    assert torch.equal(
        decode_image(odd_images.folder / "plain.png", formats=taken).pixels, read_image(odd_images.folder / "plain.png")
    )
    for name, kind in [("plain.gif", "GIF"), ("plain.webp", "WEBP"), ("plain.tif", "TIFF")]:
        with pytest.raises(ImageError, match=f"is {kind}; wanted PNG, JPEG") as caught:
            decode_image(odd_images.folder / name, formats=taken)
        assert caught.value.fault == "format"
    with pytest.raises(ImageError) as caught:
        decode_image(odd_images.folder / "plain.bmp", formats=taken)
    assert caught.value.fault == "format"


def test_a_side_or_an_animation_can_be_refused_and_a_telephones_second_picture_is_none(odd_images, tmp_path: Path):
    thin = odd_images.folder / "thin.png"  # 1 x 300
    assert decode_image(thin, max_side=300).pixels.shape == (3, 300, 1)
    with pytest.raises(ImageError, match="has 1 x 300 pixels; at most 299 a side are taken") as caught:
        decode_image(thin, max_side=299)
    assert caught.value.fault == "large"
    for name in ("animated.png", "animated.webp", "animated.gif"):
        assert decode_image(odd_images.folder / name).notes[0] == "first of 3 frames"
        with pytest.raises(ImageError, match="is an animation of 3 frames") as caught:
            decode_image(odd_images.folder / name, animated=False)
        assert caught.value.fault == "animated"
    one = Image.new("RGB", (8, 8), "red")
    one.save(tmp_path / "two.mpo", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
    red = decode_image(tmp_path / "two.mpo", formats=("JPEG",), animated=False).pixels.float().mean((1, 2))
    assert red[0] > 250 and red[2] < 5


def display_p3() -> tuple[bytes, np.ndarray]:
    """A colour profile with the primaries of Display P3 and gamma 2.2 (ICC.1:2001-04), and its matrix to XYZ (D50)."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    red, green, blue = (0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256)) + bytes(2)
    name = b"Test P3\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(78 + 1),
        b"cprt": b"text" + bytes(4) + b"none\0\0\0\0",
        b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249),
        **{key: b"XYZ " + bytes(4) + fixed(*xyz) for key, xyz in ((b"rXYZ", red), (b"gXYZ", green), (b"bXYZ", blue))},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for key, data in tags.items():
        data += bytes(-len(data) % 4)
        table += key + struct.pack(">II", start + len(body), len(data))
        body += data
    header = struct.pack(">I4xI", start + len(body), 0x02400000) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    header += fixed(0.9642, 1, 0.8249)
    return header.ljust(128, b"\0") + table + body, np.array([red, green, blue]).T
