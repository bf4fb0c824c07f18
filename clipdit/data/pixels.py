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


class PixelStore(Sequence[UInt8[Tensor, "2 3 H W"]]):
    """Source and target of every pair, fitted to (height, width) by padding. Each is read when it is first asked for, and kept
    while there is room: tens of thousands of pairs need not fit into memory.

    ValueError when there are none."""

    def __init__(self, pairs: Sequence[Pair], size: tuple[int, int], *, room_bytes: int = 4 * 2**30):
        if not pairs:
            raise ValueError("there are no pairs in this split; see `clipdit data check` for what was found")
        self.pairs, self.size = pairs, size
        self._room = room_bytes // (6 * size[0] * size[1])
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> UInt8[Tensor, "2 3 H W"]:
        """A copy of nothing: do not change it."""
        if index not in self._kept:
            pixels = torch.stack([fit(image, self.size)[0] for image in self.pairs[index].read()])
            if len(self._kept) >= self._room:
                return pixels
            self._kept[index] = pixels
        return self._kept[index]
