"""The autoencoder that we train ourselves: a linear transform of patches, and what a small network adds to it.

A few thousand images do not teach a network from nothing to carry colour through its latents within an hour; the principal
components of their patches do at once (docs/results.md). So the network begins as nothing and learns what is left. Its blocks are
those of DC-AE (Chen et al. 2024, arXiv 2410.10733), from diffusers.
"""

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d, Decoder, Encoder, ResBlock
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from clipdit.shapes import Image


class Sum(nn.Module):
    """patches(x) + network(x)."""

    def __init__(self, patches: nn.Module, network: nn.Module):
        super().__init__()
        self.patches, self.network = patches, network

    def forward(self, x: Tensor) -> Tensor:
        return self.patches(x) + self.network(x)


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Images (B, 3, H, W) in [-1, 1] <-> latents (B, C, H/p, W/p), with the interface of diffusers' AutoencoderTiny.

    Args:
        latent_channels: C.
        patch: p, pixels of a latent cell along one side, a power of 2.
        channels: the network's width at 1/2, 1/4 ... 1/p of the size, multiples of 4; four times a width divides by the next.
        encoder_layers, decoder_layers: residual blocks there.
        scaling_factor: of the latents, as in diffusers.

    The linear transform is arbitrary until `begin_with` has seen images. ValueError when the widths do not fit.
    """

    @register_to_config
    def __init__(
        self,
        *,
        latent_channels: int = 32,
        patch: int = 8,
        channels: Sequence[int] = (64, 128, 128),
        encoder_layers: Sequence[int] = (1, 1, 1),
        decoder_layers: Sequence[int] = (1, 2, 2),
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        if not channels or not len(channels) == len(encoder_layers) == len(decoder_layers) or patch != 2 ** len(channels):
            raise ValueError(
                f"patch {patch} halves the size {patch.bit_length() - 1} times; channels are {tuple(channels)}, layers "
                f"{tuple(encoder_layers)} and {tuple(decoder_layers)}; wanted one of each for every halving"
            )
        if min((*encoder_layers, *decoder_layers)) < 1:
            raise ValueError(f"layers are {tuple(encoder_layers)} and {tuple(decoder_layers)}; wanted at least 1 each")
        divide = all(4 * wide % narrow == 0 for wide, narrow in itertools.pairwise(channels) if narrow)
        if not divide or any(width < 4 or width % 4 for width in channels):
            raise ValueError(f"channels are {tuple(channels)}; wanted multiples of 4, four times each a multiple of the next")
        shape = {  # diffusers: the first level, at full size, has no layer
            "block_out_channels": (channels[0], *channels),
            "qkv_multiscales": ((),) * (len(channels) + 1),
        }
        encoder = Encoder(3, latent_channels, layers_per_block=(0, *encoder_layers), out_shortcut=False, **shape)
        decoder = Decoder(3, latent_channels, layers_per_block=(0, *decoder_layers), in_shortcut=False, **shape)
        for block in (*encoder.modules(), *decoder.modules()):
            if isinstance(block, ResBlock):
                nn.init.zeros_(cast(Tensor, block.norm.weight))
        for last in (encoder.conv_out, cast(DCUpBlock2d, decoder.conv_out).conv):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        self.encoder = Sum(nn.Conv2d(3, latent_channels, patch, patch), encoder)
        self.decoder = Sum(nn.ConvTranspose2d(latent_channels, 3, patch, patch), decoder)

    @torch.no_grad()
    def begin_with(self, images: Image) -> None:
        """Make the linear transform the principal components of these images' patches, each of mean 0 and deviation 1.

        ValueError when there are fewer components than latent channels."""
        patch, count = self.config["patch"], self.config["latent_channels"]
        if count > 3 * patch * patch:
            raise ValueError(f"latent_channels is {count}; a patch of {patch} x {patch} pixels has {3 * patch * patch} numbers")
        patches = nn.functional.unfold(images, patch, stride=patch).transpose(1, 2).flatten(0, 1).double()
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh((patches - mean).T.cov().reshape(len(mean), len(mean)))
        basis = vectors.flip(1)[:, :count] * vectors.flip(1)[:, :count].sum(0).sign()  # largest first; signs fixed
        spread = values.flip(0)[:count].clamp(min=1e-8).sqrt()
        down, up = self.encoder.patches, self.decoder.patches
        _set(down, (basis / spread).T, -mean @ (basis / spread))
        # the mean patch; a bias has one number a colour, so what it varies within the patch is left to the network
        _set(up, (basis * spread).T, mean.reshape(3, -1).mean(1))

    def encode(self, image: Image) -> AutoencoderTinyOutput:
        return AutoencoderTinyOutput(latents=self.encoder(image))

    def decode(self, latent: Tensor) -> DecoderOutput:
        return DecoderOutput(sample=self.decoder(latent))


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Fill a convolution over patches; `weight` is (latent channels, numbers in a patch)."""
    parameters = dict(layer.named_parameters())
    parameters["weight"].copy_(weight.reshape(parameters["weight"].shape))
    parameters["bias"].copy_(bias)
