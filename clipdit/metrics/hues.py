"""Which colours come back: hues of images against those of the same pixels in their copies.

A mean distance hardly sees it when an autoencoder has no green: few pixels are green, and blue of the same lightness is not far.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float

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
    wanted, found = _ab(images), _ab(copies)
    chroma = np.hypot(*wanted.T)
    names, kinds = list(HUES), _kinds(wanted)
    seen = {}
    for kind, name in enumerate(names):
        mask = (kinds == kind) & (chroma > COLOURED)
        if mask.sum() >= FEWEST:
            mean, copied = wanted[mask].mean(0), found[mask].mean(0)
            grey = np.hypot(*copied) < GREY
            seen[name] = Hue(
                pixels=int(mask.sum()),
                distance=float(np.hypot(*(copied - mean))),
                came_back="grey" if grey else names[int(_kinds(copied[None])[0])],
            )
    return seen


def _ab(images: ImageU8) -> Float[np.ndarray, "n 2"]:
    """a* and b* of every pixel."""
    rows = images.permute(0, 2, 3, 1).reshape(1, -1, 3).cpu().numpy().astype(np.float32) / 255
    return cv2.cvtColor(rows, cv2.COLOR_RGB2Lab)[0, :, 1:]


def _kinds(ab: np.ndarray) -> np.ndarray:
    """The index in HUES of each (a*, b*)."""
    degrees = np.degrees(np.arctan2(ab[:, 1], ab[:, 0])) % 360
    starts = np.array(list(HUES.values()))
    return (np.searchsorted(starts, degrees, side="right") - 1) % len(starts)
