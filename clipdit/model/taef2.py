"""TAEF2, a tiny autoencoder with 32 latent channels (Ollin Boer Bohan, MIT), as a diffusers model. Images in [-1, 1] outside.

The layers are those its published state dicts name: three-convolution residual blocks at 64 channels, stride-2 convolutions down,
nearest upsampling up, and at 1/8 resolution blocks with a "pool" branch. Layer numbers follow the files, so keys fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from clipdit.model.weights import fill, refused
from clipdit.shapes import Image


class ResBlock(nn.Module):
    """ReLU(three convolutions + x); with `pool`, a gated branch over the global statistics of GroupNorm first."""

    def __init__(self, width: int, pool: bool = False):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip
        self.pool = (
            nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False), nn.GroupNorm(4, 4 * width), nn.ReLU(inplace=True),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )
            if pool
            else None
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


class Clamp(nn.Module):
    """3 tanh(x / 3): tames latents that a diffusion model sends too far."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


@dataclass
class Parts:
    encoder: nn.Sequential
    decoder: nn.Sequential


def build(width: int, channels: int) -> Parts:
    """Encoder and decoder with the layer numbers of the published files."""

    def down() -> nn.Conv2d:
        return nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)

    def up() -> list[nn.Module]:
        return [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]

    def blocks(pool: bool = False) -> list[nn.Module]:
        return [ResBlock(width, pool) for _ in range(3)]

    first = [nn.Conv2d(3, width, 3, padding=1), ResBlock(width)]
    encoder = [*first, down(), *blocks(), down(), *blocks(), down(), *blocks(pool=True), nn.Conv2d(width, channels, 3, padding=1)]
    start = [Clamp(), nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    end = [ResBlock(width), nn.Conv2d(width, 3, 3, padding=1)]
    decoder = [*start, *blocks(pool=True), *up(), *blocks(), *up(), *blocks(), *up(), *end]
    return Parts(nn.Sequential(*encoder), nn.Sequential(*decoder))


class Taef2(ModelMixin, ConfigMixin):
    """The autoencoder, with the interface of diffusers' AutoencoderTiny."""

    @register_to_config
    def __init__(
        self,
        *,
        latent_channels: int = 32,
        encoder_block_out_channels: Sequence[int] = (64, 64, 64, 64),
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        parts = build(encoder_block_out_channels[0], latent_channels)
        self.encoder, self.decoder = parts.encoder, parts.decoder

    @classmethod
    def from_state_dicts(cls, encoder: Path, decoder: Path) -> "Taef2":
        """From the two published .pth files, in float32. Tensors alone are unpickled, nothing is executed.

        ValueError, one line, when a file is missing, damaged or something else."""
        vae = cls()
        for part, file in ((vae.encoder, encoder), (vae.decoder, decoder)):
            with refused(f"{file} cannot be read as the weights of TAEF2"):
                tensors = {n: x.float() for n, x in torch.load(file, map_location="cpu", weights_only=True).items()}
            fill(part, tensors, file)
        return vae.eval()

    def encode(self, image: Image) -> AutoencoderTinyOutput:
        return AutoencoderTinyOutput(latents=self.encoder((image + 1) / 2))

    def decode(self, latent: Tensor) -> DecoderOutput:
        return DecoderOutput(sample=self.decoder(latent) * 2 - 1)
