"""The linear transform and the network beside it."""

import pytest
import torch

from clipdit.model.autoencoder import Autoencoder, is_of_decoder, load_vae
from clipdit.model.patch_autoencoder import PatchAutoencoder


def small(**changes) -> PatchAutoencoder:
    torch.manual_seed(0)
    settings = {"latent_channels": 6, "patch": 4, "channels": (8, 16), "encoder_layers": (1, 2), "decoder_layers": (2, 1)}
    return PatchAutoencoder(**settings | changes)


def smooth(count: int = 12) -> torch.Tensor:
    """Blurred noise: patches of which a few components say most."""
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, scale_factor=8, mode="bicubic").clamp(-1, 1)


def error(vae: PatchAutoencoder, images: torch.Tensor) -> float:
    with torch.no_grad():
        return (vae.decode(vae.encode(images).latents).sample - images).square().mean().item()


def test_shapes_are_those_it_names():
    vae, wrapper = small(), Autoencoder(small())
    assert vae.encode(torch.zeros(2, 3, 16, 24)).latents.shape == (2, 6, 4, 6)
    assert vae.decode(torch.zeros(2, 6, 4, 6)).sample.shape == (2, 3, 16, 24)
    assert (wrapper.downscale, wrapper.latent_channels) == (4, 6)


def test_it_begins_with_the_principal_components_of_patches():
    """Against the singular values of the patches themselves: the best that any linear transform to so many numbers can do."""
    images, vae = smooth(), small()
    vae.begin_with(images)
    patches = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2).reshape(-1, 48)
    centred = patches - patches.mean(0)
    least = (torch.linalg.svdvals(centred)[6:] ** 2).sum() / patches.numel()
    bias = patches.mean(0).reshape(3, 16)
    # the decoder's bias has one number a colour, so what the mean patch varies within itself is not made good
    rest = (bias - bias.mean(1, keepdim=True)).square().mean()
    assert error(vae, images) == pytest.approx((least + rest).item(), rel=1e-3)
    latents = vae.encode(images).latents
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(6), rtol=1e-3, atol=0)
    correlation = latents.transpose(0, 1).flatten(1).detach().corrcoef()
    torch.testing.assert_close(correlation, torch.eye(6), rtol=0, atol=1e-3)


def test_the_network_is_nothing_at_first_and_learns():
    images, vae = smooth(), small()
    vae.begin_with(images)
    assert not vae.encoder.network(images).any()
    assert not vae.decoder.network(torch.randn(1, 6, 4, 4)).any()
    before = error(vae, images)
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    for _ in range(40):
        loss = (vae.decode(vae.encode(images).latents).sample - images).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert error(vae, images) < 0.8 * before


def test_the_decoders_parameters_are_told_by_their_names():
    vae = small()
    latents = vae.encode(smooth(2)).latents
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if is_of_decoder(name):
                parameter.add_(1.0)
    assert torch.equal(vae.encode(smooth(2)).latents, latents)


def test_it_is_saved_and_loaded_as_a_vae(tmp_path):
    vae = small()
    vae.begin_with(smooth())
    vae.save_pretrained(tmp_path)
    again = load_vae(tmp_path)
    assert isinstance(again, PatchAutoencoder)
    assert torch.equal(again.encode(smooth(1)).latents, vae.encode(smooth(1)).latents)


def test_more_components_than_a_patch_has_numbers_are_refused():
    with pytest.raises(ValueError, match=r"latent_channels is 49; a patch of 4 x 4 pixels has 48 numbers"):
        small(latent_channels=49).begin_with(smooth())


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"patch": 8}, r"patch 8 halves the size 3 times; channels are \(8, 16\)"),
        ({"patch": 6}, "patch 6"),
        ({"encoder_layers": (1,)}, r"layers \(1,\) and \(2, 1\); wanted one of each for every halving"),
        ({"decoder_layers": (1, 0)}, r"layers are \(1, 2\) and \(1, 0\); wanted at least 1 each"),
        ({"channels": (8, 24)}, r"channels are \(8, 24\); wanted multiples of 4, four times each a multiple of the next"),
        ({"channels": (8, 0)}, r"channels are \(8, 0\)"),
        ({"channels": (6, 8)}, r"channels are \(6, 8\)"),
    ],
)
def test_widths_that_do_not_fit_are_refused(change: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        small(**change)
