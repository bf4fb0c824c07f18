"""What sits in the seat of a checkpoint's network: the DiT, or a generator that stands beside it. Backends and export ask these
questions and do not ask which one it is."""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from jaxtyping import Float
from torch import Tensor

from clipdit.backend import Condition
from clipdit.shapes import Latent, Time, Tokens


@dataclass(frozen=True)
class Context:
    """What the network reads of the source: computed once per image."""

    source_tokens: Tokens | Latent | None
    """Projected source latent, (B, N, D); of a generator the source itself, (B, 3, H, W)."""
    pooled: Float[Tensor, "B D"] | None
    """Projected CLIP embedding."""
    keys_values: tuple[tuple[Tensor, Tensor] | None, ...] = field(default=())
    """For each block its cross-attention keys and values, each (B, M, D), or None where a block has none."""


@dataclass(frozen=True)
class Modulation:
    """adaLN's shifts, scales and gates: computed once per image and time."""

    blocks: Float[Tensor, "B L six D"]
    """shift, scale, gate of attention, then of the MLP."""
    final: Float[Tensor, "B two D"]
    """shift and scale before the last projection."""


class Network(ModelMixin, ConfigMixin):
    """Predicts from (x, t) and a condition. Its configuration names at least latent_channels, patch (sides of latents are
    multiples of it), conditioning, clip_token_width and clip_embedding_width.

    What does not change inside the sampling loop is split off: `context` (once per image), `modulation` (once per image and time)
    and `positions` (once per size). `forward` is all of them and `forward_prepared` in a row.
    """

    reads_clip: bool
    reads_latent: bool
    blocks: Any
    """An nn.ModuleList of modules alike, so that one can be compiled for all; empty where there are none."""
    modulation_table: Tensor
    """(L, 6, D), the shape of an image's `Modulation.blocks`."""

    def context(self, condition: Condition) -> Context:
        """What the network reads of the source; once per image."""
        raise NotImplementedError

    def modulation(self, t: Time, context: Context) -> Modulation:
        """What acts through adaLN at t; once per image and time."""
        raise NotImplementedError

    def positions(self, height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
        """What tells tokens where they are, for a latent of this size, cells; once per size."""
        raise NotImplementedError

    def forward_prepared(
        self, x: Latent, modulation: Modulation, context: Context, positions: tuple[Tensor, ...] | None = None
    ) -> Latent:
        """The part of the network that must run at every step. (B, C, h, w) -> (B, C, h, w). `positions` None are computed."""
        raise NotImplementedError

    def forward(self, x: Latent, t: Time, condition: Condition) -> Latent:
        """The prediction at (x, t), as the checkpoint's objective has it. Same shape as x. ValueError for shapes that it does not
        take."""
        raise NotImplementedError
