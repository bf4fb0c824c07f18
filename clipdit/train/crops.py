"""The batches that autoencoders are trained on: random crops of images, mirrored, some in exchanged colours."""

import torch
from jaxtyping import UInt8
from torch import Tensor

from clipdit.train.order import batch_indices


def draw_crops(
    images: UInt8[Tensor, "n 3 H W"], batch: int, step: int, seed: int, *, side: int, recolour: float, generator: torch.Generator
) -> UInt8[Tensor, "batch 3 h w"]:
    """The crops of a step, each of another image.

    Args:
        side: of a crop, pixels, less where the images are smaller; 0 takes whole images.
        recolour: share of the crops with red, green and blue exchanged and, where they are square, turned by quarters.
        generator: of this step, see clipdit.train.order.
    """
    height, width = images.shape[-2:]
    side_h, side_w = (min(side or edge, edge) for edge in (height, width))
    crops = []
    for i in batch_indices(len(images), batch, step, seed):
        top, left, flip = (int(torch.randint(n, (), generator=generator)) for n in (height - side_h + 1, width - side_w + 1, 2))
        crop = images[i, :, top : top + side_h, left : left + side_w]
        crop = crop.flip(-1) if flip else crop
        if recolour and torch.rand((), generator=generator) < recolour:
            turns = int(torch.randint(4 if side_h == side_w else 1, (), generator=generator))
            crop = crop[torch.randperm(3, generator=generator)].rot90(turns, (-2, -1))
        crops.append(crop)
    return torch.stack(crops)
