"""Contact sheets show every image, in its place, at its own aspect."""

import pytest
import torch
from PIL import ImageFont

from clipdit.sheets import GAP_PX, MARGIN_PX, contact_sheet, cut_to_width

RED, GREEN, BLUE = (220, 20, 30), (20, 200, 40), (30, 40, 210)


def plain(colour: tuple[int, int, int], height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, height, width)


def area(sheet: torch.Tensor, colour: tuple[int, int, int]) -> int:
    return int((sheet == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(dim=0).sum())


def box(sheet: torch.Tensor, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the pixels of this colour."""
    rows, columns = (sheet == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(dim=0).nonzero().unbind(dim=1)
    return (
        int(rows.min()),
        int(columns.min()),
        int(rows.max() - rows.min()) + 1,
        int(columns.max() - columns.min()) + 1,
    )


def test_columns_stand_side_by_side_in_their_order():
    sheet = contact_sheet({"source": [plain(RED)], "output": [plain(GREEN)], "target": [plain(BLUE)]}, tile_px=64)
    boxes = [box(sheet, colour) for colour in (RED, GREEN, BLUE)]
    assert [b[1] for b in boxes] == [MARGIN_PX + k * (64 + GAP_PX) for k in range(3)]
    assert {b[0] for b in boxes} == {boxes[0][0]}
    assert {b[2:] for b in boxes} == {(64, 64)}


def test_every_row_is_shown_in_one_block_or_in_several():
    column = {"a": [plain(RED)] * 5, "b": [plain(BLUE)] * 5}
    one, two = contact_sheet(column, tile_px=64), contact_sheet(column, tile_px=64, blocks=2)
    assert area(one, RED) == area(two, RED) == 5 * 64 * 64
    assert two.shape[2] > one.shape[2]
    assert two.shape[1] < one.shape[1]


def test_small_images_are_enlarged_and_the_aspect_is_kept():
    sheet = contact_sheet({"small": [plain(RED, 16, 16)], "wide": [plain(BLUE, 32, 96)]}, tile_px=96)
    assert box(sheet, RED)[2:] == (96, 96)
    assert box(sheet, BLUE)[2:] == (32, 96)


def test_headings_labels_and_title_leave_ink():
    tiles = {"source": [plain((255, 255, 255))] * 2}
    bare = contact_sheet({"": tiles["source"]}, tile_px=64)
    full = contact_sheet(tiles, labels=["shoe 1", "shoe 2"], title="two shoes", tile_px=64)
    assert int((bare < 128).sum()) == 0
    assert int((full < 128).sum()) > 200
    assert full.shape[1] > bare.shape[1]


def test_long_text_is_cut_to_its_width():
    font = ImageFont.load_default(16)
    assert cut_to_width("target", font, 200) == "target"
    cut = cut_to_width("a heading that is far too long", font, 60)
    assert cut.endswith("…")
    assert font.getlength(cut) <= 60


def test_empty_and_ragged_sheets_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        contact_sheet({})
    with pytest.raises(ValueError, match="same number"):
        contact_sheet({"a": [plain(RED)], "b": [plain(RED)] * 2})
    with pytest.raises(ValueError, match="3 labels for 1 rows"):
        contact_sheet({"a": [plain(RED)]}, labels=["1", "2", "3"])
