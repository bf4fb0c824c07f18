"""What users report as failure, counted: black, near-constant, blurred, washed-out, grey outputs, colours that no target has.

Limits come from real targets where taste would have to decide: an output is `blurred` or `washed_out` when its sharpness or
contrast is below 0.8 times that of the lowest hundredth of the real targets. So about no real target fails, and the row of the
real targets beside the model's shows it. Whether an output ignored its source is counted in compare.py, where the edges are.
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clipdit.shapes import ImageU8

BLACK_LEVEL = 12.0
"""An image with a mean below this, of 255, is black, if no real target is."""
CONSTANT_DEVIATION = 4.0
"""An image whose pixels deviate from their mean by less than this, of 255, is near-constant, if no real target is."""
COLOUR_MARGIN = 8.0
"""Levels beyond the real targets' range of mean colours before an image's mean colour counts as off."""

CLEARLY_COLOURED = 10.0
"""Mean chroma, of 255, above which a target is no grey one."""


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """Plain statistics by image, levels of 0 to 255."""

    colour: Float[Tensor, "n 3"]
    """Mean red, green, blue."""
    contrast: Float[Tensor, "n"]
    """Standard deviation of the luminance."""
    chroma: Float[Tensor, "n"]
    """Mean of (largest - smallest channel): 0 is grey."""
    sharpness: Float[Tensor, "n"]
    """Mean of the largest 2 % of luminance steps between neighbours: how hard the hardest edges are."""
    deviation: Float[Tensor, "n"]
    """Standard deviation of the pixels about their channel's mean."""

    @staticmethod
    def of(images_u8: ImageU8) -> "Appearance":
        """Of a batch of images, at least 2 px a side."""
        images = images_u8.float().cpu()
        luminance = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1)  # (B, H, W)
        steps = torch.cat([luminance.diff(dim=1).abs().flatten(1), luminance.diff(dim=2).abs().flatten(1)], dim=1)
        return Appearance(
            colour=images.mean(dim=(2, 3)),
            contrast=luminance.flatten(1).std(dim=1, correction=0),
            chroma=(images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2)),
            sharpness=steps.topk(max(1, steps.shape[1] // 50), dim=1).values.mean(dim=1),
            deviation=(images - images.mean(dim=(2, 3), keepdim=True)).square().mean(dim=(1, 2, 3)).sqrt(),
        )

    @staticmethod
    def joined(parts: "list[Appearance]") -> "Appearance":
        """Several batches as one."""
        return Appearance(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Appearance)})

    def repeated(self, times: int) -> "Appearance":
        """Each image `times` times in a row."""
        return Appearance(**{f.name: getattr(self, f.name).repeat_interleave(times, dim=0) for f in fields(Appearance)})

    def summary(self) -> dict[str, float | list[float]]:
        """Means over the images, for a report."""
        return {
            "colour_rgb": [round(v, 2) for v in self.colour.mean(dim=0).tolist()],
            "contrast": round(float(self.contrast.mean()), 2),
            "chroma": round(float(self.chroma.mean()), 2),
            "sharpness": round(float(self.sharpness.mean()), 2),
        }


def failures(outputs: Appearance, real: Appearance, own: Appearance) -> dict[str, Bool[Tensor, "n"]]:
    """Which outputs failed, by kind. One image may fail in several ways.

    `real` is a set of real targets of any length, `own` holds each output's own target: an output is `grey` when it has less than
    a seventh of the colour of its own, clearly coloured, target.
    """

    def lowest_hundredth(values: Tensor) -> float:
        return float(values.quantile(0.01))

    low, high = real.colour.amin(dim=0) - COLOUR_MARGIN, real.colour.amax(dim=0) + COLOUR_MARGIN
    return {
        "black": outputs.colour.mean(dim=1) < min(BLACK_LEVEL, float(real.colour.mean(dim=1).min()) / 2),
        "near_constant": outputs.deviation < min(CONSTANT_DEVIATION, float(real.deviation.min()) / 2),
        "washed_out": outputs.contrast < 0.8 * lowest_hundredth(real.contrast),
        "blurred": outputs.sharpness < 0.8 * lowest_hundredth(real.sharpness),
        "grey": (own.chroma > CLEARLY_COLOURED) & (outputs.chroma < own.chroma / 7),
        "colour_off": ((outputs.colour < low) | (outputs.colour > high)).any(dim=1),
    }
