"""Image files as they come in the wild: odd but fine, damaged, or no images at all.

A plain module that writes the files with Pillow and zlib alone, so that what reads them is tested by something else than itself.
tests/conftest.py offers the result as the fixture `odd_images`.
"""

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

OK = "ok"
"""Expected of a file that must be read. For the others: a part of the reason that must be given."""


def build_odd_images(folder: Path) -> dict[str, str]:
    """Write all files into folder, flat. Returns file name -> OK or a part of the reason it must be refused for."""
    folder.mkdir(parents=True, exist_ok=True)
    expected: dict[str, str] = {}

    def add(name: str, data: bytes, outcome: str = OK) -> None:
        (folder / name).write_bytes(data)
        expected[name] = outcome

    rgb = picture()
    for name, data in fine_files(rgb).items():
        add(name, data)
    for name, (data, reason) in broken_files(rgb).items():
        add(name, data, reason)

    (folder / "link.png").symlink_to("plain.png")
    expected["link.png"] = OK
    (folder / "link_to_nowhere.png").symlink_to("gone.png")
    expected["link_to_nowhere.png"] = "symbolic link to nowhere"
    os.mkfifo(folder / "pipe.png")
    expected["pipe.png"] = "not a regular file"
    if os.geteuid() != 0:  # root may read everything
        add("locked.png", save(rgb, "PNG"), "Permission denied")
        (folder / "locked.png").chmod(0)
    return expected


def picture(width: int = 48, height: int = 32) -> Image.Image:
    """Smooth colours, every corner another one."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((np.stack([x, y, 1 - x], axis=-1) * 255).round().astype(np.uint8))


def save(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG from its raw rows, each with its filter byte, for kinds that Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def fine_files(rgb: Image.Image) -> dict[str, bytes]:
    grey = rgb.convert("L")
    rgba = rgb.convert("RGBA")
    rgba.putalpha(grey)
    palette = rgb.quantize(16)
    frames = [rgb, rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT), rgb.rotate(180)]
    wide = np.asarray(grey).astype(np.uint16) * 257
    rows16 = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.asarray(rgb).astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    mirrored = Image.Exif()
    mirrored[0x0112] = 2
    cmyk = rgb.convert("CMYK")
    files = {
        "plain.png": save(rgb, "PNG"),
        "plain.jpg": save(rgb, "JPEG"),
        "plain.webp": save(rgb, "WEBP"),
        "plain.bmp": save(rgb, "BMP"),
        "plain.ppm": save(rgb, "PPM"),
        "plain.tga": save(rgb, "TGA"),
        "plain.tif": save(rgb, "TIFF"),
        "plain.gif": save(rgb, "GIF"),
        "icon.ico": save(rgb, "ICO"),
        "progressive.jpg": save(rgb, "JPEG", progressive=True),
        "grey.png": save(grey, "PNG"),
        "grey.jpg": save(grey, "JPEG"),
        "grey_alpha.png": save(rgba.convert("LA"), "PNG"),
        "one_bit.png": save(grey.convert("1"), "PNG"),
        "palette.png": save(palette, "PNG"),
        "palette_transparent.png": save(palette, "PNG", transparency=0),
        "palette_alpha.png": save(rgba.quantize(16), "PNG"),
        "rgba.png": save(rgba, "PNG"),
        "rgba.webp": save(rgba, "WEBP", lossless=True),
        "rgb_transparent_colour.png": save(rgb, "PNG", transparency=(0, 0, 255)),
        "grey16.png": save(Image.fromarray(wide), "PNG"),
        "grey16.tif": save(Image.fromarray(wide), "TIFF"),
        "rgb16.png": png(rgb.width, rgb.height, 16, 2, rows16),
        "int32.tif": save(Image.fromarray(wide.astype(np.int32)), "TIFF"),
        "float_0_to_1.tif": save(Image.fromarray(np.asarray(grey, np.float32) / 255), "TIFF"),
        "float_0_to_255.tif": save(Image.fromarray(np.asarray(grey, np.float32)), "TIFF"),
        "cmyk.jpg": save(cmyk, "JPEG"),  # inverted, with Adobe's marker, as Photoshop does
        "cmyk.tif": save(cmyk, "TIFF"),
        "ycbcr.tif": save(rgb.convert("YCbCr"), "TIFF"),
        "lab.tif": save(Image.fromarray(np.full((32, 48, 3), (128, 0, 0), np.uint8), mode="LAB"), "TIFF"),
        "exif_turned.jpg": save(rgb, "JPEG", exif=turned),
        "exif_mirrored.png": save(rgb, "PNG", exif=mirrored),
        "exif_garbage.jpg": save(rgb, "JPEG", exif=b"Exif\0\0garbage, not a TIFF header"),
        "icc_garbage.png": save(rgb, "PNG", icc_profile=b"no colour profile" * 20),
        "animated.gif": save(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": save(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "animated.png": save(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "pages.tif": save(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "one_pixel.png": save(rgb.resize((1, 1)), "PNG"),
        "thin.png": save(rgb.resize((1, 300)), "PNG"),
        "UPPER_CASE.PNG": save(rgb, "PNG"),
        "camera.JPE": save(rgb, "JPEG"),
        "no_suffix": save(rgb, "PNG"),
        "unknown_suffix.dat": save(rgb, "JPEG"),
        "jpeg_named.png": save(rgb, "JPEG"),
        "png_named.jpg": save(rgb, "PNG"),
        "two.dots.in.name.png": save(rgb, "PNG"),
        "with space, comma & 'quote'.png": save(rgb, "PNG"),
        "日本語 ñ 😀.png": save(rgb, "PNG"),
        "-leading-dash.png": save(rgb, "PNG"),
        "n" * 250 + ".png": save(rgb, "PNG"),  # near the limit of 255 bytes
    }
    return files


def broken_files(rgb: Image.Image) -> dict[str, tuple[bytes, str]]:
    noise = random.Random(0).randbytes
    large = picture(256, 256)
    cut: Callable[[bytes], bytes] = lambda data: data[: len(data) // 2]  # noqa: E731  (a field, whose default is a function)
    damaged = bytearray(save(large, "PNG"))
    damaged[len(damaged) // 2 :] = noise(len(damaged) - len(damaged) // 2)
    grey = np.asarray(rgb.convert("L"), np.float32)
    page = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    return {
        "empty.png": (b"", "empty"),
        "cut.jpg": (cut(save(large, "JPEG", quality=95)), "damaged"),
        "cut.png": (cut(save(large, "PNG")), "damaged"),
        "cut.webp": (cut(save(large, "WEBP", lossless=True)), "damaged"),
        "cut.tif": (cut(save(large, "TIFF")), "damaged"),
        "cut.bmp": (cut(save(large, "BMP")), "damaged"),
        "cut.gif": (cut(save(large, "GIF")), "damaged"),
        "damaged.png": (bytes(damaged), "damaged"),
        "only_a_header.png": (b"\x89PNG\r\n\x1a\n", "damaged"),
        "only_a_header.jpg": (b"\xff\xd8\xff\xe0", "damaged"),
        "noise.jpg": (b"\0" + noise(4000), "not an image"),
        "zeros.png": (bytes(4000), "not an image"),
        "text.png": (b"This is a text, whatever its name says.\n", "text, not an image"),
        "page.jpg": (page, "web page"),
        "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>', "SVG"),
        "drawing.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "PostScript"),
        "document.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "PDF"),
        "layers.psd": (b"8BPS\0\1" + bytes(40), "Photoshop"),
        "phone.heic": (struct.pack(">I", 24) + b"ftypheic" + bytes(40), "HEIC"),
        "phone_named.jpg": (struct.pack(">I", 24) + b"ftypmif1" + bytes(40), "HEIC"),
        "film.mp4": (struct.pack(">I", 24) + b"ftypisom" + bytes(40), "MP4"),
        "new.jxl": (b"\xff\x0a" + noise(100), "JPEG XL"),
        "archive.png": (b"PK\x03\x04" + noise(100), "ZIP"),
        "array.png": (b"\x93NUMPY\1\0" + bytes(120), "NumPy"),
        "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
        "bomb.png": (png(20_000, 10_000, 1, 0, bytes(2501 * 10_000)), "million pixels"),
        "bomb_declared.png": (png(60_000, 60_000, 8, 2, b"\0"), "million pixels"),
        "no_width.png": (png(0, 10, 8, 2, b"\0"), "damaged"),
        "nan.tif": (save(Image.fromarray(np.full_like(grey, np.nan)), "TIFF"), "float pixels"),
        "negative.tif": (save(Image.fromarray(grey - 100), "TIFF"), "float pixels"),
        "int32_large.tif": (save(Image.fromarray((grey * 1e6).astype(np.int32)), "TIFF"), "integer pixels"),
    }
