"""Contact sheets: a grid of images under column headings, for looking at what a number cannot tell."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from clipdit.images import resize
from clipdit.shapes import ImageU8

GROUND, INK, PALE = (255, 255, 255), (20, 20, 20), (110, 110, 110)
GAP_PX, MARGIN_PX = 4, 12


def contact_sheet(
    columns: Mapping[str, ImageU8 | Sequence[Tensor]],
    *,
    labels: Sequence[str] | None = None,
    title: str = "",
    tile_px: int = 128,
    blocks: int = 1,
) -> UInt8[Tensor, "3 H1 W1"]:
    """A sheet with one row an example and one column a kind of image.

    Args:
        columns: heading -> images (uint8, 3 H W), equally many in each column; each is fitted into a square of `tile_px`.
        labels: a line above each row, such as its name.
        title: a line above the sheet.
        tile_px: side of a tile, pixels. Headings are cut to its width.
        blocks: rows are dealt into this many blocks side by side, so that many rows stay on one screen.

    Raises:
        ValueError: no columns, no rows, or columns of unequal length.
    """
    counts = {name: len(images) for name, images in columns.items()}
    if not counts or len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"columns hold {counts or 'nothing'}; wanted the same number of images in each, at least 1")
    rows = next(iter(counts.values()))
    if labels is not None and len(labels) != rows:
        raise ValueError(f"{len(labels)} labels for {rows} rows; wanted one each")

    heading_font, label_font = ImageFont.load_default(max(13, tile_px // 8)), ImageFont.load_default(max(11, tile_px // 11))
    line_px, label_px = _line_height(heading_font), _line_height(label_font) if labels else 0
    blocks = min(blocks, rows)
    per_block = -(-rows // blocks)
    row_px, block_px = tile_px + label_px + GAP_PX, len(columns) * (tile_px + GAP_PX) - GAP_PX
    top = MARGIN_PX + (line_px + GAP_PX if title else 0)
    width = 2 * MARGIN_PX + blocks * block_px + (blocks - 1) * 3 * MARGIN_PX
    sheet = Image.new("RGB", (width, top + line_px + GAP_PX + per_block * row_px + MARGIN_PX), GROUND)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN_PX, MARGIN_PX), cut_to_width(title, heading_font, width - 2 * MARGIN_PX), INK, heading_font)

    for row in range(rows):
        block, line = divmod(row, per_block)
        left, y = MARGIN_PX + block * (block_px + 3 * MARGIN_PX), top + line_px + GAP_PX + line * row_px
        if labels is not None:
            draw.text((left, y), cut_to_width(labels[row], label_font, block_px), PALE, label_font)
        for column, (heading, images) in enumerate(columns.items()):
            x = left + column * (tile_px + GAP_PX)
            if line == 0:
                draw.text((x, top), cut_to_width(heading, heading_font, tile_px), INK, heading_font)
            tile = _tile(images[row], tile_px)
            sheet.paste(tile, (x + (tile_px - tile.width) // 2, y + label_px + (tile_px - tile.height) // 2))
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)


def cut_to_width(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> str:
    """The text, with an ellipsis where it would be wider than `width_px`."""
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text + "…") > width_px:
        text = text[:-1]
    return text.rstrip() + "…"


def _tile(image_u8: UInt8[Tensor, "3 H W"], tile_px: int) -> Image.Image:
    """The image with its longer side at `tile_px`. Small ones are enlarged by whole pixels, so that one sees what is there."""
    height, width = image_u8.shape[-2:]
    if tile_px % max(height, width) == 0:
        factor = tile_px // max(height, width)
        image_u8 = image_u8.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)
    else:
        scale = tile_px / max(height, width)
        image_u8 = resize(image_u8, (max(1, round(height * scale)), max(1, round(width * scale))))
    return Image.fromarray(image_u8.cpu().permute(1, 2, 0).contiguous().numpy())


def _line_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return round(font.getbbox("Ág")[3]) + 3
