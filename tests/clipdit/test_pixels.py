"""Pixels of pairs, all at once: in order, fitted, uint8."""

from pathlib import Path

import pytest
import torch

from clipdit.data.layouts import Pair
from clipdit.data.pixels import read_pixels
from clipdit.images import ImageError, fit, write_image


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    """Five pairs of sizes of their own; source and target of pair i are filled with 10 i and 10 i + 5."""
    made = []
    for i in range(5):
        for side, value in (("a", 10 * i), ("b", 10 * i + 5)):
            write_image(tmp_path / side / f"{i}.png", torch.full((3, 16 + 2 * i, 24), value, dtype=torch.uint8))
        made.append(Pair(id=str(i), source=tmp_path / "a" / f"{i}.png", target=tmp_path / "b" / f"{i}.png"))
    return made


def test_pairs_come_in_order_and_fitted_as_one_image_is(pairs: list[Pair]):
    seen = []
    pixels = read_pixels(pairs, (32, 32), on_pair=lambda: seen.append(1))
    assert pixels.shape == (5, 2, 3, 32, 32) and pixels.dtype == torch.uint8
    assert len(seen) == 5
    for i, pair in enumerate(pairs):
        for side, image in enumerate(pair.read()):
            assert torch.equal(pixels[i, side], fit(image, (32, 32))[0])
        assert pixels[i, :, 0, 16, 16].tolist() == [10 * i, 10 * i + 5]


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="there are no pairs in this split"):
        read_pixels([], (32, 32))


def test_a_broken_file_is_named(pairs: list[Pair]):
    pairs[3].target.write_bytes(b"\x89PNG broken")
    with pytest.raises(ImageError) as caught:
        read_pixels(pairs, (32, 32))
    assert str(pairs[3].target) in str(caught.value)
