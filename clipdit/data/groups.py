"""Which pairs show nearly the same thing, and a split that keeps them together.

Product photographs come in colour variants, films in neighbouring frames. Split at random, a model is tested on what it has
learned by heart. Here pairs are compared by where their edges lie, in source and target: the same shoe in another colour has
other pixels, and nearly the same edges.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

MAX_DISTANCE = 0.22
"""Largest distance between near-duplicates, 0 (equal) to 2. Measured on 1,000 pairs of edges2shoes (docs/data.md): below it
four of five pairs are variants of one model and the others look alike; above it unlike shoes begin to join."""

LARGE_GROUP = 0.25
"""A group larger than this fraction of a val or test split stays in train: such a split would show little else."""

EDGE_CELLS, PIXELS_PER_CELL = 32, 2


def describe(source_u8: UInt8[Tensor, "3 Hs Ws"], target_u8: UInt8[Tensor, "3 Ht Wt"]) -> Float[Tensor, "F"]:
    """Where a pair has edges, as a vector of length 1, so that 1 - dot product is the distance of two pairs."""
    return torch.cat([_edges(source_u8), _edges(target_u8)]) / 2**0.5


class Groups:
    """Items that hang together, directly or through others (union-find). An item's group is named by its smallest member."""

    def __init__(self, count: int):
        self._first = list(range(count))

    def of(self, item: int) -> int:
        while self._first[item] != item:
            self._first[item] = self._first[self._first[item]]  # halves the way for those who come later
            item = self._first[item]
        return item

    def join(self, a: int, b: int) -> None:
        a, b = self.of(a), self.of(b)
        self._first[max(a, b)] = min(a, b)

    def join_equal(self, keys: Sequence[Iterable[str]]) -> None:
        """Join items that have a key in common: pairs that share a file, say."""
        first_with: dict[str, int] = {}
        for item, own in enumerate(keys):
            for key in own:
                self.join(first_with.setdefault(key, item), item)

    def join_near(self, descriptors: Float[Tensor, "n F"], max_distance: float = MAX_DISTANCE, rows_at_once: int = 2048) -> None:
        """Join items whose descriptors (see `describe`) are not farther apart than max_distance; a minute for 50,000 items."""
        for i in range(0, len(descriptors), rows_at_once):
            rows = descriptors[i : i + rows_at_once].float()
            for j in range(i, len(descriptors), rows_at_once):
                near = rows @ descriptors[j : j + rows_at_once].float().T >= 1 - max_distance  # (rows, columns)
                self._join_block(near, i, j)

    def _join_block(self, near: Bool[Tensor, "rows columns"], top: int, left: int) -> None:
        # One link for each row and column that has an open one, again until none is open: n equal images have n * n / 2 links.
        while True:
            row_groups = torch.tensor([self.of(top + row) for row in range(near.shape[0])])
            column_groups = torch.tensor([self.of(left + column) for column in range(near.shape[1])])
            near = near & (row_groups[:, None] != column_groups)
            rows, columns = near.any(1).nonzero().flatten(), near.any(0).nonzero().flatten()
            if not len(rows):
                return
            for row, column in zip(rows.tolist(), near[rows].byte().argmax(1).tolist(), strict=True):
                self.join(top + row, left + column)
            for row, column in zip(near[:, columns].byte().argmax(0).tolist(), columns.tolist(), strict=True):
                self.join(top + row, left + column)


def assign_splits(groups: Sequence[str], *, val_fraction: float, test_fraction: float) -> list[str]:
    """ "train", "val" or "test" for each pair, from its group's name alone, so that a pair keeps its split when others are added.

    From three groups on, each split with a fraction above 0 gets at least one. Large groups stay in train (LARGE_GROUP).
    """
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise ValueError(
            f"val and test are {val_fraction} and {test_fraction} of the pairs; wanted fractions that leave some to train"
        )
    sizes = Counter(groups)
    position = {group: _position(group) for group in sizes}
    split = {}
    for group, size in sizes.items():
        name, fraction = ("test", test_fraction) if position[group] < test_fraction else ("val", val_fraction)
        inside = position[group] < test_fraction + val_fraction
        split[group] = name if inside and size <= max(1, LARGE_GROUP * fraction * len(groups)) else "train"
    for name, fraction in (("train", 1.0), ("test", test_fraction), ("val", val_fraction)):
        if fraction > 0 and len(sizes) >= 3 and name not in split.values():
            fullest = max(sorted(set(split.values())), key=list(split.values()).count)
            split[min((g for g in sizes if split[g] == fullest), key=lambda g: (sizes[g], position[g]))] = name
    return [split[group] for group in groups]


def _position(group: str) -> float:
    """A name's fixed place in [0, 1), spread evenly."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest()) / 2**64


def _edges(image_u8: UInt8[Tensor, "3 H W"]) -> Float[Tensor, "f"]:
    """Strength of the grey gradient on a 32 x 32 grid, without its mean, length 1. The root makes faint edges count: a variant in
    a light colour has the same ones, fainter."""
    side = EDGE_CELLS * PIXELS_PER_CELL
    grey = image_u8.float().mean(0, keepdim=True)[None] / 255  # (1, 1, H, W)
    grey = F.interpolate(grey, (side, side), mode="area")
    across = F.pad(grey[..., :, 1:] - grey[..., :, :-1], (0, 1))
    down = F.pad(grey[..., 1:, :] - grey[..., :-1, :], (0, 0, 0, 1))
    strength = F.avg_pool2d((across**2 + down**2).sqrt(), PIXELS_PER_CELL).sqrt().flatten()  # (1024,)
    strength = strength - strength.mean()
    length = strength.norm()
    if length < 1e-4:  # a blank image: far from every other kind (all those have mean 0), equal to another blank one
        return torch.full_like(strength, len(strength) ** -0.5)
    return strength / length
