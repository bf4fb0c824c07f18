"""Faithfulness of a translation to a drawing: does it have edges where the drawing has lines, and only there?

Edges are taken from the output (Canny) and compared with the given lines, with a tolerance in pixels. Precision is the share of
the output's edge pixels that lie near a given line, recall the share of the given lines that lie near an edge of the output, F1
their harmonic mean; 0 to 1, higher is more faithful. Not even the true target scores 1, as its edges and the drawing come from
two detectors: read a score beside the row of the real targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from torch import Tensor

EdgeMask = Bool[np.ndarray, "H W"]

CANNY_LOW, CANNY_HIGH = 60, 160
"""Canny's thresholds, on the L2 norm of the 3 x 3 Sobel gradient of levels 0 to 255: 160 is a step of about 55 levels."""
BLUR_SIGMA_PX = 0.8
INK = 0.25
"""How far from the ground, as a share of black to white, a pixel of a drawing counts as line."""


@dataclass(frozen=True, kw_only=True)
class EdgeAgreement:
    """Of one image with one drawing, each 0 to 1."""

    precision: float
    recall: float
    f1: float


def default_tolerance_px(size: tuple[int, int]) -> int:
    """1 px at 64, 2 px at 128, 4 px at 256: about the same share of the picture."""
    return max(1, round(min(size) / 64))


def is_drawing(image_u8: UInt8[Tensor, "3 H W"]) -> bool:
    """Whether an image is an edge map or line drawing: grey, on a plain light or dark ground, with lines on 0.2 to 40 % of it."""
    image = image_u8.short()
    grey = float((image.amax(dim=0) - image.amin(dim=0)).float().mean()) < 6  # JPEG colours a grey image slightly
    level = image.float().mean(dim=0)
    ground = float(level.median())
    plain = ground > 220 or ground < 35
    lines = float(((level - ground).abs() > INK * 255).float().mean())
    flat = float(((level - ground).abs() < 30).float().mean())
    return grey and plain and 0.002 <= lines <= 0.4 and flat >= 0.6


def drawing_lines(image_u8: UInt8[Tensor, "3 H W"]) -> EdgeMask:
    """The lines of a drawing on a light or dark ground: the pixels that differ from the ground by more than INK."""
    level = image_u8.float().mean(dim=0)
    return ((level - level.median()).abs() > INK * 255).cpu().numpy()


def image_edges(image_u8: UInt8[Tensor, "3 H W"]) -> EdgeMask:
    """Canny edges (1986) of a colour image, one pixel wide: the gradient at a pixel is that of its strongest channel, so that a
    border between two equally bright colours counts."""
    image = np.ascontiguousarray(image_u8.permute(1, 2, 0).cpu().numpy())
    image = cv2.GaussianBlur(image, (0, 0), BLUR_SIGMA_PX)
    dx, dy = cv2.Sobel(image, cv2.CV_16S, 1, 0), cv2.Sobel(image, cv2.CV_16S, 0, 1)  # (H, W, 3)
    strongest = (dx.astype(np.int32) ** 2 + dy.astype(np.int32) ** 2).argmax(axis=-1)[..., None]
    dx, dy = (np.ascontiguousarray(np.take_along_axis(d, strongest, axis=-1)[..., 0]) for d in (dx, dy))
    return cv2.Canny(dx, dy, CANNY_LOW, CANNY_HIGH, L2gradient=True) > 0


class GivenEdges:
    """The lines of n sources, with the distance of every pixel to them, computed once."""

    def __init__(self, lines: list[EdgeMask], *, tolerance_px: int) -> None:
        self.lines = lines
        self.tolerance_px = tolerance_px
        self.near = [near(mask, tolerance_px) for mask in lines]

    def agreement(self, found: EdgeMask, sources: Sequence[int]) -> list[EdgeAgreement]:
        """How the edges found in one output agree with each of these sources. Without an edge in the output, or a line in the
        source, all are 0; without either, all are 1."""
        near_found = near(found, self.tolerance_px)
        agreements = []
        for i in sources:
            lines = self.lines[i]
            if lines.any() and found.any():
                precision, recall = float(self.near[i][found].mean()), float(near_found[lines].mean())
            else:
                precision = recall = float(not lines.any() and not found.any())
            f1 = 2 * precision * recall / max(precision + recall, 1e-9)
            agreements.append(EdgeAgreement(precision=precision, recall=recall, f1=f1))
        return agreements


def near(mask: EdgeMask, tolerance_px: int) -> EdgeMask:
    """The pixels no farther than `tolerance_px` (Euclidean) from a pixel of the mask."""
    side = np.arange(-tolerance_px, tolerance_px + 1)
    disc = (side[:, None] ** 2 + side[None, :] ** 2 <= tolerance_px**2).astype(np.uint8)
    return cv2.dilate(mask.astype(np.uint8), disc) > 0
