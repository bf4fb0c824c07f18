"""The generators of Pix2Pix and Pix2PixHD: the published networks, by-image randomness, and the questions that a DiT answers."""

import pytest
import torch
from torch import nn

from clipdit.backend import Condition
from clipdit.model.generators import Generator, GlobalGenerator, UNet


def images(count: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(count: int, side: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["unet", "global"])
def generator(request) -> Generator:
    torch.manual_seed(0)
    made = UNet(width=4, levels=5, patch=32) if request.param == "unet" else GlobalGenerator(width=4, residuals=2)
    return made.eval()


def test_the_unet_is_the_published_one():
    network = UNet()
    convolutions = [m for m in network.down.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [64, 128, 256, 512, 512, 512, 512, 512]
    ups = [m for m in network.up.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [c.out_channels for c in ups] == [512, 512, 512, 512, 256, 128, 64, 3]
    assert all((c.kernel_size, c.stride) == ((4, 4), (2, 2)) for c in convolutions + ups)
    norms = [m for m in network.modules() if isinstance(m, nn.InstanceNorm2d)]
    assert len(norms) == 6 + 7, "none on the first and the last level down, none on the last up"
    # 54.414 M, as the authors' PyTorch code prints
    assert sum(p.numel() for p in network.parameters()) == 54_414_531


def test_the_global_generator_is_the_published_one():
    network = GlobalGenerator()
    # 182,546,755 as the authors' code counts for 36 channels of labels and edges; ours reads 3
    assert sum(p.numel() for p in network.parameters()) == 182_546_755 - 33 * 64 * 7 * 7
    assert sum(type(m).__name__ == "ResidualBlock" for m in network.modules()) == 9


def test_weights_begin_as_published():
    torch.manual_seed(0)
    network = UNet(width=32, levels=5, patch=32)
    weights = torch.cat([m.weight.flatten() for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)])
    scales = torch.cat([m.weight for m in network.modules() if isinstance(m, nn.InstanceNorm2d)])
    assert float(weights.mean()) == pytest.approx(0, abs=1e-3) and float(weights.std()) == pytest.approx(0.02, rel=0.02)
    assert float(scales.mean()) == pytest.approx(1, abs=2e-3) and float(scales.std()) == pytest.approx(0.02, rel=0.1)


def test_an_image_has_the_size_of_its_source_and_stays_in_range(generator: Generator):
    for side in (64, 96):
        made = generator.generate(images(2, side), noise(2, side))
        assert made.shape == (2, 3, side, side) and made.abs().max() <= 1


def test_an_image_depends_on_its_own_source_and_noise_alone(generator: Generator):
    source, given = images(3, 64), noise(3, 64)
    with torch.inference_mode():
        together = generator.generate(source, given)
        alone = generator.generate(source[1:2], given[1:2])
        others = generator.generate(torch.cat((source[2:], source[1:2])), torch.cat((given[:1], given[1:2])))
    torch.testing.assert_close(alone[0], together[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(others[1], together[1], atol=1e-5, rtol=1e-4)


def test_the_unets_noise_is_dropout_of_half_of_three_levels():
    torch.manual_seed(0)
    network, source = UNet(width=4, levels=5, patch=32).eval(), images(2, 32)
    with torch.inference_mode():
        one, again, other = (network.generate(source, noise(2, 32, seed)) for seed in (1, 1, 2))
        scaled = network.generate(source, noise(2, 32, 1) * 3)
    assert torch.equal(one, again) and torch.equal(one, scaled), "only the signs of the noise count"
    assert (one - other).abs().mean() > 1e-3
    plain = UNet(width=4, levels=5, patch=32, dropout=False).eval()
    assert torch.equal(plain.generate(source, noise(2, 32, 1)), plain.generate(source, noise(2, 32, 2)))


def test_each_kept_number_counts_double_and_decisions_begin_again_where_the_noise_ends():
    from clipdit.model.generators import _dropout_by

    given = torch.tensor([1.0, -1, 1, 1, -1, 1, -1, -1, 1, 1, -1, 1]).reshape(1, 3, 2, 2)
    drop = _dropout_by(given)
    first = drop(torch.ones(1, 8, 1, 1)).flatten()
    second = drop(torch.ones(1, 2, 2, 2)).flatten()
    assert first.tolist() == [2, 0, 2, 2, 0, 2, 0, 0]
    assert second.tolist() == [2, 2, 0, 2, 2, 0, 2, 2]


def test_it_answers_what_a_dit_is_asked(generator: Generator):
    source, x, t = images(2, 64), noise(2, 64), torch.zeros(2)
    condition = Condition(tokens=source.new_zeros(2, 0, 1), pooled=source.new_zeros(2, 1), latent=source)
    context = generator.context(condition)
    with torch.inference_mode():
        asked = generator.forward_prepared(x, generator.modulation(t, context), context, generator.positions(64, 64, x.device))
        assert torch.equal(asked, generator(x, t, condition)) and torch.equal(asked, generator.generate(source, x))


@pytest.mark.parametrize("side", [48, 40])
def test_a_size_that_does_not_divide_is_refused(side: int):
    source, x = images(1, side), noise(1, side)
    condition = Condition(tokens=source.new_zeros(1, 0, 1), pooled=source.new_zeros(1, 1), latent=source)
    network = UNet(width=2, levels=5, patch=32)
    with pytest.raises(ValueError, match=f"source is 3 x {side} x {side}.*multiples of 32"):
        network(x, torch.zeros(1), condition)


def test_settings_that_make_no_network_are_refused():
    with pytest.raises(ValueError, match="patch 16; wanted"):
        UNet(levels=5, patch=16)
    with pytest.raises(ValueError, match="0 downs"):
        GlobalGenerator(downs=0, patch=1)
