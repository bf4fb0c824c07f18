"""The real images that an export calibrates on and judges by: the user's pairs, or the samples that come with the package."""

from dataclasses import dataclass
from pathlib import Path

import torch

from clipdit.backend import builtin_checkpoint
from clipdit.data.pairs import find_pairs
from clipdit.data.pixels import read_pixels
from clipdit.demo import read_samples
from clipdit.images import fit
from clipdit.shapes import ImageU8

COUNT = 16
"""Pairs to calibrate on, at most, and as many others to judge by, unless the user says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pairs at the size of the graphs."""

    calibration: ImageU8
    """Sources."""
    sources: ImageU8
    """To judge by."""
    targets: ImageU8
    said: str
    """What they are, in words, for the manifest."""

    @property
    def seeds(self) -> list[int]:
        """One for each judged source."""
        return list(range(len(self.sources)))


def from_pairs(folder: Path, size: tuple[int, int], count: int = COUNT) -> Pictures:
    """Calibrates on the training split, judges by the test split (validation, if there is none), at most `count` of each.
    ValueError without either."""
    found = find_pairs(folder, group_near_duplicates=False)
    train, held = found.split("train"), found.split("test") or found.split("val")
    if not train or not held:
        raise ValueError(
            f"{folder} holds {len(train)} pairs to calibrate on and {len(held)} to judge by; wanted both. "
            f"`clipdit data check {folder}` says what was found"
        )
    calibration = read_pixels(_spread(train, count), size)
    judged = read_pixels(_spread(held, count), size)
    return Pictures(
        calibration=calibration[:, 0],
        sources=judged[:, 0],
        targets=judged[:, 1],
        said=f"{len(calibration)} pairs of the training split, judged by {len(judged)} held-out ones",
    )


def from_samples(size: tuple[int, int], count: int = COUNT) -> Pictures:
    """Half of the package's samples for each: drawings of emoji, right for the built-in checkpoint and for models of its kind."""
    samples = read_samples(builtin_checkpoint().parent / "samples")
    sources, targets = (torch.stack([fit(image, size)[0] for image in side]) for side in (samples.source, samples.target))
    half = min(len(sources) // 2, count)
    return Pictures(
        calibration=sources[:half],
        sources=sources[half : 2 * half],
        targets=targets[half : 2 * half],
        said=f"{half} of the package's samples, judged by {half} others; --calibration takes your own pairs",
    )


def _spread(pairs: list, count: int) -> list:
    """So many of them, evenly over the list."""
    if len(pairs) <= count:
        return pairs
    return [pairs[i * len(pairs) // count] for i in range(count)]
