"""What the graphs of a bundle are called with when real images are translated: for calibration, sensitivity and drift.

The calls are those of the fp32 variant. Another variant that is given them (teacher forcing) shows its own error and not what
errors have led to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clipdit.shapes import ImageU8
from clipdit.translator import Translator
from clipdit_export.backends.base import Tensors
from clipdit_export.backends.opening import open_variant
from clipdit_export.bundle import Bundle
from clipdit_export.sessions import Feed


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Of some images, all of one size."""

    calls: dict[str, list[Feed]]
    """By part, in order; those of `step` are one for each time of the table, again for each batch of images."""
    images: ImageU8
    """What came out."""
    rows: int
    """Of the sampling table."""
    batches: int

    def by_row(self) -> list[list[Feed]]:
        """The calls of `step` for each row of the table, over all batches."""
        calls = self.calls["step"]
        each = len(calls) // (self.rows * self.batches)  # 2 where guidance needs two calls, for a backend of small batches
        return [[call for i, call in enumerate(calls) if i // each % self.rows == row] for row in range(self.rows)]


def record(
    bundle: Bundle, variant: str, sources_u8: ImageU8, *, seeds: Sequence[int], steps: int | None = None, batch: int = 4
) -> Trajectory:
    """Translate `sources_u8` with a variant of a bundle and keep every call.

    Args:
        seeds: one an image.
        steps: None is the model's own number. batch: images in a call, if the bundle takes so many."""
    calls: dict[str, list[Feed]] = {}

    def keep(part: str, given: Tensors) -> None:
        calls.setdefault(part, []).append({name: tensor.cpu().numpy().copy() for name, tensor in given.items()})

    backend = open_variant(bundle, variant, on_call=keep, in_parts=True)
    step = min(batch, bundle.manifest.max_batch)
    starts = range(0, len(sources_u8), step)
    with Translator(backend) as translator:
        rows = len(backend.table(steps or backend.defaults.steps, backend.defaults.solver).rows)
        images = [translator(sources_u8[i : i + step], seeds=seeds[i : i + step], steps=steps) for i in starts]
    return Trajectory(calls=calls, images=torch.cat(images), rows=rows, batches=len(starts))
