"""The autoencoder of models that work on pixels: none. Its latents are the pixels themselves, one cell for each."""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from clipdit.shapes import Image


class Pixels(ModelMixin, ConfigMixin):
    """The identity, with the interface of diffusers' AutoencoderTiny: (B, 3, H, W) pixels in [-1, 1] -> the same, both ways."""

    unit: Tensor
    """The one number of its weights: by it the folder has weights, and the module a device and a dtype."""

    @register_to_config
    def __init__(self, *, latent_channels: int = 3, block_out_channels: Sequence[int] = (3,), scaling_factor: float = 1.0):
        super().__init__()
        if (latent_channels, len(block_out_channels)) != (3, 1):
            raise ValueError("pixels have 3 channels, and as many cells as there are pixels")
        self.register_buffer("unit", torch.ones(()))

    def encode(self, image: Image) -> AutoencoderTinyOutput:
        return AutoencoderTinyOutput(latents=image)

    def decode(self, latent: Tensor) -> DecoderOutput:
        return DecoderOutput(sample=latent)
