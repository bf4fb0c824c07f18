"""Image files to uint8 RGB: what Pillow can open becomes one upright sRGB picture; what it cannot gets a reason in one line.

Public names are re-exported by clipdit.images, which is what other modules import.
"""

import io
import stat
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 89_478_485
"""Largest image decoded unless told otherwise, pixels: Pillow's own limit against decompression bombs (256 MiB of RGB). More than
twice this is refused whatever is told."""

READ_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "ICO", "AVIF", "JPEG2000", "QOI")
"""Pillow decoders in use. A list, because others start programs (EPS runs Ghostscript) or draw nothing we want (WMF)."""

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".tga", ".ico", ".avif", ".jp2", ".j2k", ".qoi", ".mpo",
))
"""File names that promise an image we read, lower case."""

FOREIGN_SUFFIXES = frozenset((
    ".heic", ".heif", ".jxl", ".svg", ".svgz", ".psd", ".xcf", ".eps", ".pdf", ".ai", ".exr", ".hdr", ".dng", ".cr2", ".cr3",
    ".nef", ".arw", ".mp4", ".mov",
))
"""File names that promise a picture we cannot read. Listed, so that such a file is named in a report and not passed over."""
# fmt: on

T = TypeVar("T")

_ORIENTATION = 0x0112
"""The EXIF tag: 1 is upright, 2 to 8 are mirrored or turned."""
_SIDEWAYS = (5, 6, 7, 8)
"""Orientations that swap height and width."""

_MAGIC = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG2000",
    b"qoif": "QOI",
}
"""First bytes that only an image has, and whose."""

_FOREIGN_CONTENT = (
    (b"<!doctype html", "is a web page (HTML), not an image; a download that failed often looks so"),
    (b"<html", "is a web page (HTML), not an image; a download that failed often looks so"),
    (b"<svg", "is an SVG drawing; wanted pixels. Render it to PNG first"),
    (b"<?xml", "is XML (perhaps SVG), not an image of pixels. Render it to PNG first"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself. Run `git lfs pull`"),
    (b"%pdf", "is a PDF. Save its page as PNG first"),
    (b"%!ps", "is PostScript. Save it as PNG first"),
    (b"8bps", "is a Photoshop document. Save it as PNG first"),
    (b"\xff\x0a", "is JPEG XL, which is not supported. Save it as PNG or JPEG first"),
    (b"\0\0\0\x0cjxl ", "is JPEG XL, which is not supported. Save it as PNG or JPEG first"),
    (b"pk\x03\x04", "is a ZIP archive, not an image"),
    (b"\x1f\x8b", "is gzip data, not an image"),
    (b"\x93numpy", "is a NumPy array file, not an image"),
)
"""(first bytes in lower case, what the file is) for what people mistake for images."""


Fault = Literal["damaged", "empty", "format", "large", "animated"]
"""What is wrong with a file, for programs: it cannot be read to its end, has 0 bytes, is none of the formats that were asked for,
has more pixels than were allowed, or is an animation where none was wanted."""


class ImageError(ValueError):
    """This file cannot be used as an image. `reason` is one line; `path` is the file, None for bytes; `fault` is the
    reason for programs."""

    def __init__(self, reason: str, path: Path | None = None, *, fault: Fault = "damaged"):
        super().__init__(reason)
        self.reason = reason
        self.path = path
        self.fault: Fault = fault

    def __str__(self) -> str:
        return self.reason if self.path is None else f"{self.path}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """An image and what had to be done to it on the way."""

    pixels: UInt8[Tensor, "3 H W"]
    notes: tuple[str, ...]
    """Conversions that changed more than the container, in words: "16 bits reduced to 8", "first of 12 frames" ..."""


def read_image(source: Path | str | bytes, *, max_pixels: int = MAX_PIXELS) -> UInt8[Tensor, "3 H W"]:
    """An image file, or its bytes, as uint8 (3, H, W): upright by its EXIF orientation, RGB (sRGB), transparency over white,
    the first frame of an animation. Raises ImageError, and nothing else, for what cannot be read."""
    return _open(source, max_pixels, _to_rgb).pixels


def decode_image(
    source: Path | str | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    max_side: int | None = None,
    formats: Sequence[str] = READ_FORMATS,
    animated: bool = True,
) -> DecodedImage:
    """`read_image`, with notes on what was converted.

    Args:
        max_pixels, max_side: larger images are refused by their header alone, pixels; None is any side.
        formats: Pillow decoders that may be used, of READ_FORMATS; files of others are not opened.
        animated: the first frame of an animation is taken; False refuses it.
    """

    def use(image: Image.Image) -> DecodedImage:
        if max_side is not None and max(image.size) > max_side:
            raise ImageError(f"has {image.width} x {image.height} pixels; at most {max_side} a side are taken", fault="large")
        # MPO is a photograph with a preview or a depth map behind it, as telephones write it: no animation.
        if not animated and image.format != "MPO" and getattr(image, "is_animated", False):
            raise ImageError(
                f"is an animation of {getattr(image, 'n_frames', 2)} frames; wanted a single picture", fault="animated"
            )
        return _to_rgb(image)

    return _open(source, max_pixels, use, formats)


def image_size(source: Path | str | bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) that `read_image` will return, pixels, from the file's header alone. Raises ImageError as `read_image` does
    for a file that is no image; damage to the pixels shows only there."""
    return _open(source, max_pixels, _upright_size)


def looks_like_image(path: Path) -> bool:
    """Whether a file belongs in a list of images: its name promises one (also one we cannot read), or its first bytes do."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix in FOREIGN_SUFFIXES:
        return True
    try:
        check_regular(path)
        with path.open("rb") as stream:
            head = stream.read(32)
    except (ImageError, OSError):
        return False
    return _format_of(head) is not None


def check_regular(path: Path) -> None:
    """ImageError unless path is a file that can be read without waiting (a pipe would block for ever)."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise ImageError("is a symbolic link to nowhere" if path.is_symlink() else "does not exist") from error
    if stat.S_ISDIR(mode):
        raise ImageError("is a folder, not an image file")
    if not stat.S_ISREG(mode):
        raise ImageError("is not a regular file")


def _open(
    source: Path | str | bytes, max_pixels: int, use: Callable[[Image.Image], T], formats: Sequence[str] = READ_FORMATS
) -> T:
    """What `use` makes of the opened image. Whatever goes wrong becomes an ImageError."""
    if isinstance(source, bytes):
        return _open_stream(io.BytesIO(source), max_pixels, use, formats)
    path = Path(source)
    try:
        check_regular(path)
        with path.open("rb") as stream:
            return _open_stream(stream, max_pixels, use, formats)
    except ImageError as error:
        raise ImageError(error.reason, path, fault=error.fault) from error
    except OSError as error:  # permission, input/output error, name too long
        raise ImageError(f"cannot be opened: {error.strerror or error}", path) from error
    except ValueError as error:  # a NUL character in the name
        raise ImageError(f"cannot be opened: {_one_line(error)}", path) from error


def _open_stream(
    stream: io.BytesIO | io.BufferedReader, max_pixels: int, use: Callable[[Image.Image], T], formats: Sequence[str]
) -> T:
    head = stream.read(512)
    stream.seek(0)
    if not head:
        raise ImageError("is empty (0 bytes)", fault="empty")
    # Pillow stops at twice its own limit, however much is allowed here.
    limit = f"{min(max_pixels, 2 * MAX_PIXELS) / 1e6:.3g} million pixels"
    with warnings.catch_warnings():
        # Pillow warns of large images, odd EXIF, odd TIFF tags: we either take the file or say why not. Only Pillow is silenced,
        # because threads that read at the same time can leave this filter behind.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            with Image.open(stream, formats=tuple(formats)) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ImageError(f"is {width} x {height}, more than {limit}. Scale it down first", fault="large")
                return use(image)
        except ImageError:
            raise
        except UnidentifiedImageError as error:
            kind = _format_of(head)
            if kind is not None and kind not in formats:
                raise ImageError(f"is {kind}; wanted {', '.join(formats)}. Save it as one of these", fault="format") from error
            raise ImageError(_what_else(head), fault="format" if kind is None else "damaged") from error
        except Image.DecompressionBombError as error:
            raise ImageError(f"has more than {limit}. Scale it down first", fault="large") from error
        except MemoryError as error:
            raise ImageError("needs more memory than there is. Scale it down first", fault="large") from error
        except Exception as error:
            # On damaged files Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError, zlib.error,
            # OverflowError, MemoryError ...: no list of them is complete, and one file must not end a run over 50,000.
            raise ImageError(f"is damaged: {_one_line(error)}") from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if image.getexif().get(_ORIENTATION, 1) in _SIDEWAYS else (height, width)


def _to_rgb(image: Image.Image) -> DecodedImage:
    """Any Pillow image -> upright sRGB pixels, and notes."""
    notes: list[str] = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        image.seek(0)
        notes.append(f"first of {frames} frames")
    image.load()
    profile = image.info.get("icc_profile")
    if image.getexif().get(_ORIENTATION, 1) in range(2, 9):
        image = ImageOps.exif_transpose(image)
        notes.append("turned upright by its EXIF orientation")
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_grey8(image, notes)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            notes.append("transparency put on white")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = _to_srgb(image, profile, notes)
    # OpenCV takes a fifth of NumPy's time, and torch would share it among threads, which wait for each other on a busy machine
    planes = np.empty((3, image.height, image.width), np.uint8)
    cv2.split(np.asarray(image), list(planes))
    return DecodedImage(pixels=torch.from_numpy(planes), notes=tuple(notes))


def _to_grey8(image: Image.Image, notes: list[str]) -> Image.Image:
    """Integer grey of up to 16 bits, or float grey, -> 8 bits. Pillow's own convert("L") clips at 255: nearly all white."""
    values = np.asarray(image).astype(np.float64)  # (H, W)
    low, high = float(values.min()), float(values.max())  # NaN, if there is one, fails the comparisons below
    if image.mode == "F":
        if not (low >= 0 and high <= 255):
            raise ImageError(f"has float pixels from {low:.4g} to {high:.4g}; wanted 0 to 1 or 0 to 255")
        scale = 255 if high <= 1 else 1
        notes.append(f"float pixels taken as 0 to {255 // scale}")
    else:
        if not (low >= 0 and high <= 65535):
            raise ImageError(f"has integer pixels from {low:.0f} to {high:.0f}; wanted 8 or 16 bits (0 to 65535)")
        scale = 255 / 65535
        notes.append("16 bits reduced to 8")
    return Image.fromarray((values * scale).round().astype(np.uint8))


def _to_srgb(image: Image.Image, embedded: bytes | None, notes: list[str]) -> Image.Image:
    """RGB, through the embedded colour profile when there is one other than sRGB: without it wide-gamut photographs (most phones)
    turn pale and CMYK turns garish."""
    if image.mode in ("RGBA", "L", "LA", "P", "1"):
        image = image.convert("RGB")
    if embedded and image.mode in ("RGB", "CMYK", "LAB"):
        try:
            profile = ImageCms.getOpenProfile(io.BytesIO(embedded))
            name = ImageCms.getProfileDescription(profile).strip()
            # A grey profile on what is RGB by now, say, has no meaning for these pixels.
            if "srgb" not in name.lower() and getattr(profile.profile, "xcolor_space", "").strip() == image.mode:
                image = _through_profile(image, profile)
                notes.append(f"colours converted from {name} to sRGB")
        except (ImageCms.PyCMSError, OSError):
            notes.append("damaged colour profile ignored")
    if image.mode == "RGB":
        return image
    notes.append(f"converted from {image.mode}")
    if image.mode == "LAB":  # which convert() does not know
        return _through_profile(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
    return image.convert("RGB")


def _through_profile(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None  # it is None only with inPlace=True
    return converted


def _format_of(head: bytes) -> str | None:
    """The image format that the first 12 bytes promise, as Pillow names it; None when they promise none."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:12] == b"ftypavif":
        return "AVIF"
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def _what_else(head: bytes) -> str:
    """What a file that is no image seems to be, from its first bytes."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, words in _FOREIGN_CONTENT:
        if start.startswith(magic):
            return words
    if head[4:8] == b"ftyp":
        if head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
            return "is HEIC/HEIF, which is not supported. Save it as JPEG or PNG first"
        return "is an MP4 or QuickTime file, not an image"
    if _format_of(head) is not None or head[:4] == b"RIFF":
        return "is damaged or of a rare kind: its first bytes say image, the rest does not follow"
    if all(byte in b"\t\n\r\f\x1b" or byte >= 32 for byte in head):
        return "is text, not an image"
    return "is not an image of a known format"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
