"""Paired augmentation: one geometry for source and target, so that they keep lying on each other; colours only where asked.

Everything is drawn from an explicit seed. A pair has a fixed number of *views*, view 0 being the pair as it is, so that the
latents of all views can be computed once and cached.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

ImageLike = TypeVar("ImageLike", UInt8[Tensor, "3 H W"], Float[Tensor, "3 H W"])
"""uint8 in [0, 255] or float in [-1, 1]."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What may change from view to view. Only mirroring is on by default."""

    views: int = 2
    """Versions of each pair, the untouched one included; 1 is no augmentation."""
    flip: bool = True
    """Mirror left and right: every second view, or with probability 1/2 in `augment`."""
    max_rotation_degrees: float = 0.0
    """Turned by up to this angle, either way."""
    max_zoom: float = 0.0
    """Scaled by a factor between 1 / (1 + max_zoom) and 1 + max_zoom."""
    max_shift: float = 0.0
    """Moved by up to this fraction of width and of height."""
    jitter: float = 0.0
    """Scaled up by this fraction, and a part of the old size cut out at random: the jitter of Pix2Pix, whose 286 px for 256 are
    30 / 256."""
    border: Literal["replicate", "white"] = "replicate"
    """What comes in from outside after a turn, zoom or shift: the border's pixels repeated, or white."""
    max_brightness: float = 0.0
    """Multiplied by a factor between 1 - max_brightness and 1 + max_brightness."""
    max_contrast: float = 0.0
    """Distance to the mean grey, likewise."""
    max_saturation: float = 0.0
    """Distance to the pixel's own grey, likewise."""
    max_hue: float = 0.0
    """Turned by up to this fraction of the colour circle, at most 0.5."""
    colour_of: Literal["source", "target", "both"] = "source"
    """Which image the four changes above apply to; "both" changes both alike."""

    def __post_init__(self) -> None:
        if self.views < 1:
            raise ValueError(f"views is {self.views}; wanted 1 or more")
        for name, most in (
            ("max_rotation_degrees", 180),
            ("max_zoom", 1),
            ("max_shift", 1),
            ("jitter", 1),
            ("max_brightness", 1),
            ("max_contrast", 1),
            ("max_saturation", 1),
            ("max_hue", 0.5),
        ):
            if not 0 <= (value := getattr(self, name)) <= most:
                raise ValueError(f"{name} is {value}; wanted 0 to {most}")


def augment(source: ImageLike, target: ImageLike, settings: Augment, seed: int | torch.Generator) -> tuple[ImageLike, ImageLike]:
    """A random version of a pair of equal sizes; the same seed gives the same version. The input is not changed, size and dtype
    stay. uint8 in [0, 255], or float in [-1, 1]."""
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    return _apply(source, target, settings, _draw(settings, generator))


def view(source: ImageLike, target: ImageLike, settings: Augment, pair_id: str, index: int) -> tuple[ImageLike, ImageLike]:
    """Version `index` of a pair, 0 <= index < settings.views: the same whenever it is asked for. View 0 is the pair itself; with
    `flip` odd views are mirrored, so that two views are an image and its mirror image and never the same twice."""
    if not 0 <= index < settings.views:
        raise ValueError(f"view is {index}; wanted 0 to {settings.views - 1}")
    if index == 0:
        return source, target
    change = _draw(settings, torch.Generator().manual_seed(_view_seed(pair_id, index)))
    change.flip = settings.flip and index % 2 == 1
    return _apply(source, target, settings, change)


@dataclass(kw_only=True)
class _Change:
    """One draw. All numbers are always drawn, in this order, so that switching one change on leaves the others as they were."""

    flip: bool
    rotation_degrees: float
    zoom: float
    shift_x: float
    shift_y: float
    brightness: float
    contrast: float
    saturation: float
    hue: float


def _draw(settings: Augment, generator: torch.Generator) -> _Change:
    u = (2 * torch.rand(9, generator=generator, dtype=torch.float64) - 1).tolist()  # in [-1, 1)
    return _Change(
        flip=settings.flip and u[0] < 0,
        rotation_degrees=u[1] * settings.max_rotation_degrees,
        zoom=(1 + settings.max_zoom) ** u[2] * (1 + settings.jitter),
        shift_x=u[3] * (settings.max_shift + settings.jitter / 2),
        shift_y=u[4] * (settings.max_shift + settings.jitter / 2),
        brightness=1 + u[5] * settings.max_brightness,
        contrast=1 + u[6] * settings.max_contrast,
        saturation=1 + u[7] * settings.max_saturation,
        hue=u[8] * settings.max_hue,
    )


def _view_seed(pair_id: str, index: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{pair_id}|{index}".encode(), digest_size=8).digest()) >> 1  # 63 bits, as torch wants


def _apply(source: ImageLike, target: ImageLike, settings: Augment, change: _Change) -> tuple[ImageLike, ImageLike]:
    if settings.colour_of in ("source", "both"):
        source = _recolour(source, change)
    if settings.colour_of in ("target", "both"):
        target = _recolour(target, change)
    return _move(source, change, settings.border), _move(target, change, settings.border)


def _move(image: ImageLike, change: _Change, border: str) -> ImageLike:
    if change.flip:
        image = image.flip(-1)  # exact: a mirror image is not resampled
    if (change.rotation_degrees, change.zoom, change.shift_x, change.shift_y) == (0, 1, 0, 0):
        return image
    height, width = image.shape[-2:]
    angle = math.radians(change.rotation_degrees)
    cos, sin = math.cos(angle) / change.zoom, math.sin(angle) / change.zoom
    # Where each output pixel comes from, in units of half the image (both sides reach from -1 to 1). The turn is in pixels, so
    # the two mixed terms carry the aspect.
    dx, dy = 2 * change.shift_x, 2 * change.shift_y
    mixed = height / width
    matrix = torch.tensor([[cos, sin * mixed, -cos * dx - sin * mixed * dy], [-sin / mixed, cos, sin / mixed * dx - cos * dy]])
    grid = F.affine_grid(matrix[None], [1, 3, height, width], align_corners=False).to(image.device)  # (1, H, W, 2)
    white = 255.0 if image.dtype == torch.uint8 else 1.0
    pixels = image[None].float()
    if border == "white":
        moved = white + F.grid_sample(pixels - white, grid, padding_mode="zeros", align_corners=False)
    else:
        moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return (moved.round() if image.dtype == torch.uint8 else moved)[0].to(image.dtype)


def _recolour(image: ImageLike, change: _Change) -> ImageLike:
    if (change.brightness, change.contrast, change.saturation, change.hue) == (1, 1, 1, 0):
        return image
    unit = image if image.dtype == torch.uint8 else (image + 1) / 2  # torchvision's float images are in [0, 1]
    unit = tvf.adjust_brightness(unit, change.brightness)
    unit = tvf.adjust_contrast(unit, change.contrast)
    unit = tvf.adjust_saturation(unit, change.saturation)
    unit = tvf.adjust_hue(unit, change.hue)
    return unit if image.dtype == torch.uint8 else unit * 2 - 1
