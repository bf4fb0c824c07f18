"""Representation alignment (REPA, Yu et al. 2025): what a block of the DiT holds of a noisy target is to say what an encoder sees
in the clean one. The encoder is the CLIP that the model has anyway; the projection is thrown away after training.
"""

from typing import cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clipdit.model.dit import DiT
from clipdit.shapes import ClipTokens


class Alignment(nn.Module):
    """1 - cosine similarity of a DiT's tokens, projected, with CLIP's of the target.

    The tokens are those behind the first third of the blocks (REPA: the 8th of 24 or 28), as they were when the DiT last ran.

    Args:
        token_width: of CLIP's tokens.
    """

    def __init__(self, dit: DiT, token_width: int):
        super().__init__()
        width, depth = dit.config["width"], dit.config["depth"]
        self.project = nn.Sequential(  # REPA's head: three layers
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, token_width)
        )
        self._tokens: Tensor | None = None
        dit.blocks[max(0, depth // 3 - 1)].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, arguments: tuple, output: tuple[Tensor, Tensor]) -> None:
        self._tokens = output[0]

    def forward(self, cells: tuple[int, int], wanted: ClipTokens) -> Float[Tensor, "B"]:
        """An image's mean over the DiT's tokens, which are `cells` rows and columns; CLIP's grid is brought to theirs."""
        tokens, self._tokens = cast(Tensor, self._tokens), None  # (B, rows * columns, D)
        side = round(wanted.shape[1] ** 0.5)
        grid = wanted.float().transpose(1, 2).unflatten(2, (side, side))
        if cells != (side, side):
            grid = F.interpolate(grid, size=cells, mode="bilinear", align_corners=False)
        return 1 - F.cosine_similarity(self.project(tokens).float(), grid.flatten(2).transpose(1, 2), dim=-1).mean(1)
