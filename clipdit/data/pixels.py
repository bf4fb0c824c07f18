"""Reads pairs into one array of pixels at the training size: small enough to keep for thousands of pairs, quick to draw from."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import UInt8
from torch import Tensor

from clipdit.data.layouts import Pair
from clipdit.images import fit


def read_pixels(
    pairs: Sequence[Pair], size: tuple[int, int], *, on_pair: Callable[[], object] = lambda: None
) -> UInt8[Tensor, "n 2 3 H W"]:
    """Source and target of every pair, fitted to (height, width) by padding; 6 H W bytes a pair.

    ValueError when there are none."""
    if not pairs:
        raise ValueError("there are no pairs in this split; see `clipdit data check` for what was found")
    pixels = torch.empty((len(pairs), 2, 3, *size), dtype=torch.uint8)

    def read(i: int) -> None:
        for side, image in enumerate(pairs[i].read()):
            pixels[i, side] = fit(image, size)[0]

    with ThreadPoolExecutor(4) as pool:  # decoding releases the interpreter's lock
        for _ in pool.map(read, range(len(pairs))):
            on_pair()
    return pixels
