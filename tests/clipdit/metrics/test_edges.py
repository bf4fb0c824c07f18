"""Edges are found, compared with a tolerance, and drawings are told from pictures."""

import numpy as np
import pytest
import torch

from clipdit.metrics.edges import GivenEdges, default_tolerance_px, drawing_lines, image_edges, is_drawing, near


def square(top: int, left: int, side: int, *, colour=(200, 30, 30), size: int = 64) -> torch.Tensor:
    image = torch.full((3, size, size), 255, dtype=torch.uint8)
    image[:, top : top + side, left : left + side] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    return image


def outline(top: int, left: int, side: int) -> torch.Tensor:
    drawing = square(top, left, side, colour=(0, 0, 0))
    drawing[:, top + 1 : top + side - 1, left + 1 : left + side - 1] = 255
    return drawing


def agreement(drawing: torch.Tensor, output: torch.Tensor, tolerance_px: int = 1):
    given = GivenEdges([drawing_lines(drawing)], tolerance_px=tolerance_px)
    return given.agreement(image_edges(output), [0])[0]


def test_an_output_on_its_lines_agrees():
    found = agreement(outline(16, 16, 30), square(16, 16, 30))
    assert (found.precision, found.recall, found.f1) == (1, 1, 1)


@pytest.mark.parametrize("tolerance_px", [2, 3])
def test_a_shift_by_one_pixel_is_within_the_tolerance_and_a_large_one_is_not(tolerance_px):
    assert agreement(outline(16, 16, 30), square(17, 17, 30), tolerance_px).f1 == 1
    assert agreement(outline(16, 16, 30), square(24, 24, 30), tolerance_px).f1 < 0.3


def test_agreement_falls_with_the_shift():
    values = [agreement(outline(16, 16, 30), square(16 + shift, 16, 30)).f1 for shift in (0, 3, 6, 9)]
    assert values[0] == 1
    assert values == sorted(values, reverse=True)


def test_an_invented_edge_costs_precision_and_a_missing_one_recall():
    one, two = square(4, 4, 20), square(4, 4, 20)
    two[:, 36:56, 36:56] = 60
    drawing_one, drawing_two = outline(4, 4, 20), torch.minimum(outline(4, 4, 20), outline(36, 36, 20))
    invented, missing = agreement(drawing_one, two), agreement(drawing_two, one)
    assert invented.recall == 1
    assert 0.4 < invented.precision < 0.6
    assert missing.precision == 1
    assert 0.4 < missing.recall < 0.6


def test_nothing_agrees_with_nothing_only():
    blank = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    assert agreement(blank, blank).f1 == 1
    assert agreement(blank, square(16, 16, 30)).f1 == 0
    assert agreement(outline(16, 16, 30), blank).f1 == 0


def test_a_border_between_equally_bright_colours_is_an_edge():
    image = torch.empty(3, 32, 32, dtype=torch.uint8)
    image[:, :, :16] = torch.tensor([200, 60, 60], dtype=torch.uint8)[:, None, None]
    image[:, :, 16:] = torch.tensor([60, 131, 60], dtype=torch.uint8)[:, None, None]
    columns = np.flatnonzero(image_edges(image).any(axis=0))
    assert set(columns) <= {15, 16}
    assert len(columns) == 1


def test_lines_are_read_on_a_light_and_on_a_dark_ground():
    drawing = outline(16, 16, 30)
    assert drawing_lines(drawing).sum() == 4 * 30 - 4
    assert np.array_equal(drawing_lines(drawing), drawing_lines(255 - drawing))


def test_near_is_a_disc():
    mask = np.zeros((9, 9), bool)
    mask[4, 4] = True
    assert near(mask, 1).sum() == 5
    assert near(mask, 2).sum() == 13
    assert np.array_equal(near(mask, 0), mask)


def test_drawings_are_told_from_pictures():
    noise = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grey_ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(3, 64, 64)
    assert is_drawing(outline(16, 16, 30))
    assert is_drawing(255 - outline(16, 16, 30))
    assert not is_drawing(square(16, 16, 30))  # coloured
    assert not is_drawing(noise)
    assert not is_drawing(grey_ramp)
    assert not is_drawing(torch.full((3, 64, 64), 255, dtype=torch.uint8))  # no line


@pytest.mark.parametrize(("size", "wanted"), [((32, 32), 1), ((64, 64), 1), ((128, 128), 2), ((256, 512), 4)])
def test_the_tolerance_is_a_share_of_the_picture(size, wanted):
    assert default_tolerance_px(size) == wanted
