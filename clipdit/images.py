"""Images in, images out: files to uint8 RGB tensors, any size to the model's and back, [0, 255] to [-1, 1].

With decoding.py, whose names are re-exported here, the only place that touches pixel formats, EXIF and the factor 127.5.
"""

import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import deflate
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from clipdit.decoding import MAX_PIXELS, DecodedImage, ImageError, decode_image, image_size, looks_like_image, read_image
from clipdit.files import write_atomically

__all__ = [
    "MAX_PIXELS",
    "WRITE_FORMATS",
    "Box",
    "DecodedImage",
    "Fit",
    "ImageError",
    "Placement",
    "decode_image",
    "encode_image",
    "fit",
    "image_size",
    "looks_like_image",
    "read_image",
    "resize",
    "to_float",
    "to_u8",
    "write_image",
]

WRITE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
"""What `write_image` writes, by lower-case suffix."""

Fit = Literal["pad", "crop", "stretch"]
"""How an image comes to a given size: see `fit`."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle of whole pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, image: Tensor) -> Tensor:
        """This part of a (..., H, W) image: a view."""
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where an image went when it was fitted, so that its translation can be put back."""

    taken: Box
    """The part of the original that was used; all of it unless cropped."""
    content: Box
    """Where that part lies in the fitted image; all of it unless padded."""
    size: tuple[int, int]
    """(height, width) of the fitted image, pixels."""

    def restore(self, image_u8: UInt8[Tensor, "*batch 3 H W"]) -> UInt8[Tensor, "*batch 3 H0 W0"]:
        """A translation of the fitted image, at the original's size and aspect: padding is cut off, the rest resized. After
        `how="crop"` the result has the size of the part that was kept: what was cut away was never translated."""
        if tuple(image_u8.shape[-2:]) != self.size:
            height, width = image_u8.shape[-2:]
            raise ValueError(f"image is {width} x {height}; this placement was made for {self.size[1]} x {self.size[0]}")
        return resize(self.content.cut(image_u8), (self.taken.height, self.taken.width))


def fit(
    image_u8: UInt8[Tensor, "*batch 3 H W"], size: tuple[int, int], how: Fit = "pad"
) -> tuple[UInt8[Tensor, "*batch 3 H1 W1"], Placement]:
    """An image of any size as one of `size` (height, width), pixels, and the way back.

    - "pad": the whole image, aspect kept, centred; the rest repeats the border pixels. Not white: a border continues a drawing on
      white as white and one on black as black, and makes no new edge that a model would take for content.
    - "crop": the largest centred part with the wanted aspect.
    - "stretch": the whole image, aspect not kept.
    """
    height, width = image_u8.shape[-2:]
    wanted_height, wanted_width = size
    if min(height, width, wanted_height, wanted_width) < 1:
        raise ValueError(f"cannot fit {width} x {height} to {wanted_width} x {wanted_height}; sides must be at least 1 pixel")
    taken, content = Box(top=0, left=0, height=height, width=width), Box(top=0, left=0, height=wanted_height, width=wanted_width)
    if how == "pad":
        scale = min(wanted_height / height, wanted_width / width)
        content = _centred((wanted_height, wanted_width), (round(height * scale), round(width * scale)))
    elif how == "crop":
        scale = min(height / wanted_height, width / wanted_width)
        taken = _centred((height, width), (round(wanted_height * scale), round(wanted_width * scale)))
    elif how != "stretch":
        raise ValueError(f'fit is "{how}"; wanted "pad", "crop" or "stretch"')
    fitted = resize(taken.cut(image_u8), (content.height, content.width))
    if how == "pad" and tuple(fitted.shape[-2:]) != size:
        bottom, right = wanted_height - content.top - content.height, wanted_width - content.left - content.width
        fitted = tvf.pad(fitted, [content.left, content.top, right, bottom], padding_mode="edge")
    return fitted, Placement(taken=taken, content=content, size=(wanted_height, wanted_width))


def resize(image_u8: UInt8[Tensor, "*batch 3 H W"], size: tuple[int, int]) -> UInt8[Tensor, "*batch 3 H1 W1"]:
    """Bicubic with antialiasing, to (height, width) pixels. Returns the same tensor when it has that size already."""
    if tuple(image_u8.shape[-2:]) == tuple(size):
        return image_u8
    if tuple(size) == (1, 1):  # on a single output pixel PyTorch's uint8 kernel fails an assertion of its own (2.15)
        pixel = tvf.resize(image_u8.float(), [1, 1], interpolation=InterpolationMode.BICUBIC, antialias=True)
        return pixel.round().clamp(0, 255).to(torch.uint8)
    return tvf.resize(image_u8, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)


def to_float(image_u8: UInt8[Tensor, "*batch 3 H W"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*batch 3 H W"]:
    """[0, 255] -> [-1, 1]."""
    return (image_u8.to(torch.float32) / 127.5 - 1).to(dtype)


def to_u8(image: Float[Tensor, "*batch 3 H W"]) -> UInt8[Tensor, "*batch 3 H W"]:
    """[-1, 1] -> [0, 255], rounded; values outside are clipped. The inverse of `to_float` for every pixel value. NaN has no pixel
    value: whoever could make one looks for it first."""
    return ((image.to(torch.float32).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def encode_image(image_u8: UInt8[Tensor, "3 H W"], format: str = "PNG", *, quality: int = 95, effort: int = 1) -> bytes:
    """The bytes of an image file; format as Pillow names it ("PNG", "JPEG", "WEBP" ...). quality, 0 to 100, for lossy formats.
    effort, 0 to 9, for PNG: zlib's level, 0 for no compression. Pillow's usual 6 takes longer than all else around a quick model;
    1 is 3 to 9 times as fast, for up to a third more bytes."""
    if format.upper() not in WRITE_FORMATS.values():
        raise ValueError(f'image format is "{format}"; wanted one of {", ".join(sorted(set(WRITE_FORMATS.values())))}')
    planes = image_u8.detach().cpu().numpy()
    if format.upper() == "PNG" and effort <= 1:
        return _encode_png_in_haste(planes, effort)
    image = Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))
    # Full chroma resolution: thin coloured lines lose their colour under JPEG's usual 4:2:0.
    options = {
        "JPEG": {"quality": quality, "subsampling": 0},
        "WEBP": {"quality": quality},
        "PNG": {"compress_level": effort},
    }.get(format.upper(), {})
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def _encode_png_in_haste(planes: UInt8[np.ndarray, "3 H W"], level: int) -> bytes:
    """Each row as its difference to the one above (PNG, 3rd edition, sec. 9: filter 2), compressed by libdeflate. Pillow tries
    five such filters on every row, whatever the level; and libdeflate takes half of zlib's time for fewer bytes. (Intel's ISA-L
    takes half of that again, but once compressed the same pixels to other bytes, why is not known, and a ledger's checksums and a
    resumed job cannot bear that.)"""
    pixels = cv2.merge([np.ascontiguousarray(plane) for plane in planes])  # an eighth of the time of a permuted tensor's
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, -1)
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = 2
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    parts = [(b"IHDR", header), (b"IDAT", deflate.zlib_compress(filtered, level)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(name, data) for name, data in parts)


def _png_chunk(name: bytes, data: bytes | bytearray) -> bytes:
    return b"".join([struct.pack(">I", len(data)), name, data, struct.pack(">I", deflate.crc32(data, deflate.crc32(name)))])


def write_image(path: Path | str, image_u8: UInt8[Tensor, "3 H W"], *, quality: int = 95) -> None:
    """Write an image in the format its suffix names, making folders as needed. Whoever looks at `path` sees the old file, no file
    or the whole new one, never a part: also after a kill or on a full disk. ValueError for a suffix not in WRITE_FORMATS."""
    path = Path(path)
    format = WRITE_FORMATS.get(path.suffix.lower())
    if format is None:
        raise ValueError(f"{path} ends in {path.suffix or 'no suffix'}; wanted one of {', '.join(WRITE_FORMATS)}")
    write_atomically(path, encode_image(image_u8, format, quality=quality))


def _centred(outer: tuple[int, int], inner: tuple[int, int]) -> Box:
    """A box of about `inner` (height, width) in the middle of `outer`, at least one pixel and no larger than it."""
    height, width = (min(max(1, i), o) for i, o in zip(inner, outer, strict=True))
    return Box(top=(outer[0] - height) // 2, left=(outer[1] - width) // 2, height=height, width=width)
