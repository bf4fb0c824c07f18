"""No autoencoder at all: latents are pixels, there and back without a change."""

import pytest
import torch

from clipdit.model.autoencoder import Autoencoder, load_vae
from clipdit.model.pixels import Pixels


def test_latents_are_the_pixels(tmp_path):
    Pixels().save_pretrained(tmp_path / "vae")
    autoencoder = Autoencoder(load_vae(tmp_path))
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    assert (autoencoder.latent_channels, autoencoder.downscale) == (3, 1)
    assert torch.equal(autoencoder.encode(image), image) and torch.equal(autoencoder.decode(image), image)


def test_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="3 channels"):
        Pixels(latent_channels=4)
