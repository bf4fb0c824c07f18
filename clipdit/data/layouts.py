"""What a layout is made of: pairs, problems, and the checks that need no more than file headers.

folders.py and manifest.py make a `Layout` of what they find; pairs.py makes a usable set of it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxtyping import UInt8
from torch import Tensor

from clipdit.images import DecodedImage, Fit, ImageError, decode_image, fit, image_size

Direction = Literal["AtoB", "BtoA"]
Size = tuple[int, int]

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Folder names and manifest entries that mean a split, lower case."""

MAX_ASPECT_DIFFERENCE = 0.01
"""How much width/height of source and target may differ, as a fraction. Both are fitted to one size later, so the number of
pixels may differ; a different aspect means that the two do not lie on each other."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One source and its target: two files, or the halves of one. Small and picklable; pixels are read when asked for."""

    id: str
    """Unique in its set: the path without suffix and without the folder that names the side, such as `train/17`."""
    source: Path
    target: Path
    """The same file as `source` in a side-by-side image."""
    source_half: Literal["left", "right"] | None = None
    """Where the source lies in a side-by-side image; None where the partners are two files."""
    split: str = ""
    """"train", "val" or "test"; "" while nobody has said."""
    group: str = ""
    """Pairs of one group are near-duplicates and stay in one split. "" while nobody has said."""

    def read(self, size: Size | None = None, how: Fit = "pad") -> tuple[UInt8[Tensor, "3 Hs Ws"], UInt8[Tensor, "3 Ht Wt"]]:
        """(source, target), uint8. Both fitted to `size` (height, width), pixels, as clipdit.images.fit does it; without `size`
        each as large as its file, which may differ between partners. Raises ImageError."""
        source, target = (image.pixels for image in self.decode())
        return (source, target) if size is None else (fit(source, size, how)[0], fit(target, size, how)[0])

    def decode(self) -> tuple[DecodedImage, DecodedImage]:
        """`read` without fitting, with notes on what was converted."""
        image = decode_image(self.source)
        if self.source_half is None:
            return image, decode_image(self.target)
        middle = image.pixels.shape[-1] // 2
        left = DecodedImage(pixels=image.pixels[..., :middle].contiguous(), notes=image.notes)
        right = DecodedImage(pixels=image.pixels[..., middle:].contiguous(), notes=image.notes)
        return (left, right) if self.source_half == "left" else (right, left)


@dataclass(frozen=True)
class Problem:
    """A file that could not be used, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(kw_only=True)
class Layout:
    """What a folder or manifest holds. `split` and `group` of its pairs are as given, "" where they are not."""

    name: Literal["side-by-side", "two-folders", "manifest"]
    pairs: list[Pair] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a person should know of the choices made here, a line each."""

    def add(self, pair: Pair) -> None:
        """Take a pair of two files, or note why it cannot be one."""
        problem = header_problem(pair)
        if problem is None:
            self.pairs.append(pair)
        else:
            self.problems.append(problem)


def header_problem(pair: Pair) -> Problem | None:
    """What the headers of a pair of two files have against it; None is nothing."""
    try:
        height, width = image_size(pair.source)
        target_height, target_width = image_size(pair.target)
    except ImageError as error:
        return Problem(error.path or pair.source, error.reason)
    a, b = width * target_height, target_width * height
    if abs(a - b) <= MAX_ASPECT_DIFFERENCE * max(a, b):
        return None
    return Problem(
        pair.target, f"is {target_width} x {target_height}, its source {width} x {height}; wanted equal aspects, within 1 %"
    )


def some(names: list[str], most: int = 3) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
