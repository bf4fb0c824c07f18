"""Which colours come back: hues of images against those of the same pixels in their copies.

A mean distance hardly sees it when an autoencoder has no green: few pixels are green, and blue of the same lightness is not far.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from clipdit.shapes import ImageU8

HUES = {"red": 10, "orange": 55, "yellow": 82, "green": 115, "cyan": 175, "blue": 235, "violet": 297, "pink": 335}
"""Where each begins on the circle of CIELAB's a* and b*, degrees; it ends where the next one begins."""

COLOURED = 25.0
"""Chroma from which a pixel has a hue."""
GREY = 12.0
"""Chroma below which a mean has none."""
TURNED = 25.0
"""Distance in a* b* from which a colour counts as another: that of orange to yellow, or of a colour to grey."""
FEWEST = 400
"""Pixels of a hue from which something is said of it; one emoji of 128 px has some 5,000 in all."""


@dataclass(frozen=True, kw_only=True)
class Hue:
    """What became of the pixels of one hue."""

    pixels: int
    distance: float
    """From their mean in a* b* to that of their copies."""
    came_back: str
    """The hue of their copies' mean, or "grey"."""

    @property
    def turned(self) -> bool:
        return self.distance > TURNED


def hues(images: ImageU8, copies: ImageU8) -> dict[str, Hue]:
    """Each hue that at least FEWEST pixels of `images` have, uint8 (B, 3, H, W) both, in the order of HUES."""
    names = list(HUES)
    counts, wanted_sums, found_sums = np.zeros(len(names), int), np.zeros((len(names), 2)), np.zeros((len(names), 2))
    for image, copy in zip(images, copies, strict=True):  # one by one: in floating point, all together would not fit
        wanted, found = _ab(image), _ab(copy)
        kinds = np.where(np.hypot(*wanted.T) > COLOURED, _kinds(wanted), -1)
        for kind in range(len(names)):
            mask = kinds == kind
            counts[kind] += mask.sum()
            wanted_sums[kind] += wanted[mask].sum(0, dtype=float)
            found_sums[kind] += found[mask].sum(0, dtype=float)
    seen = {}
    for kind in np.flatnonzero(counts >= FEWEST):
        mean, copied = wanted_sums[kind] / counts[kind], found_sums[kind] / counts[kind]
        seen[names[kind]] = Hue(
            pixels=int(counts[kind]),
            distance=float(np.hypot(*(copied - mean))),
            came_back="grey" if np.hypot(*copied) < GREY else names[int(_kinds(copied[None])[0])],
        )
    return seen


def _ab(image: UInt8[Tensor, "3 H W"]) -> Float[np.ndarray, "n 2"]:
    """a* and b* of every pixel."""
    pixels = image.permute(1, 2, 0).cpu().numpy().astype(np.float32) / 255
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2Lab)[..., 1:].reshape(-1, 2)


def _kinds(ab: np.ndarray) -> np.ndarray:
    """The index in HUES of each (a*, b*)."""
    degrees = np.degrees(np.arctan2(ab[:, 1], ab[:, 0])) % 360
    starts = np.array(list(HUES.values()))
    return (np.searchsorted(starts, degrees, side="right") - 1) % len(starts)
