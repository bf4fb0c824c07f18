"""Losses on decoded images: zero at the target, gradients that lead there, one value an image."""

import pytest
import torch

from clipdit import losses
from clipdit.losses import ClipSimilarityLoss, PerceptualLoss
from clipdit.metrics.weights import MissingWeights


@pytest.fixture(scope="module", params=["st-lpips", "efficientnet-lite0"])
def perceptual(request) -> PerceptualLoss:
    return PerceptualLoss(request.param)


def images(seed: int, batch: int = 2) -> torch.Tensor:
    small = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(small, size=(48, 48), mode="bilinear")


def tiny_encoder(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and an embedding: means of 4 x 4 blocks."""
    tokens = torch.nn.functional.adaptive_avg_pool2d(image, 4).flatten(2).transpose(1, 2)
    return tokens, tokens.flatten(1)


def test_perceptual_loss_is_zero_at_the_target_and_grows_with_the_error(perceptual):
    target = images(0)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    values = torch.stack([perceptual(target + s * noise, target) for s in (0.0, 0.05, 0.2, 0.6)])
    assert values.shape == (4, 2)
    assert values[0].tolist() == [0, 0]
    assert (values.diff(dim=0) > 0).all()


def test_perceptual_loss_gives_finite_gradients_to_the_output_only(perceptual):
    output, target = images(0).requires_grad_(), images(1).requires_grad_()
    perceptual(output, target).mean().backward()
    assert output.grad is not None
    assert output.grad.isfinite().all()
    assert output.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    assert target.grad is None
    assert all(not parameter.requires_grad for parameter in perceptual.parameters())


def test_a_small_step_against_the_gradient_lowers_the_perceptual_loss(perceptual):
    target, output = images(1), images(0).requires_grad_()
    before = perceptual(output, target).sum()
    (gradient,) = torch.autograd.grad(before, output)
    with torch.no_grad():
        after = perceptual(output - 1e-3 * gradient / gradient.square().mean().sqrt(), target).sum()
    assert after < before


def test_plain_images_give_finite_gradients(perceptual):
    output = torch.zeros(1, 3, 48, 48, requires_grad=True)
    perceptual(output, torch.full((1, 3, 48, 48), -1.0)).sum().backward()
    assert output.grad is not None
    assert output.grad.isfinite().all()


def test_perceptual_loss_is_computed_in_float32_under_autocast(perceptual):
    plain = perceptual(images(0), images(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = perceptual(images(0), images(1))
    assert torch.equal(plain, mixed)


def test_clip_similarity_loss_is_one_minus_the_cosine():
    loss = ClipSimilarityLoss(tiny_encoder)
    target = images(0)
    assert loss(target, target).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert loss(-target, target).tolist() == pytest.approx([2, 2], abs=1e-6)
    a, b = tiny_encoder(images(1))[1], tiny_encoder(target)[1]
    wanted = 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    assert torch.allclose(loss(images(1), target), wanted, atol=1e-6)


def test_clip_similarity_loss_gives_finite_gradients_to_the_output_only():
    output, target = images(0).requires_grad_(), images(1).requires_grad_()
    ClipSimilarityLoss(tiny_encoder)(output, target).sum().backward()
    assert output.grad is not None
    assert output.grad.isfinite().all()
    assert output.grad.abs().max() > 0
    assert target.grad is None


def test_an_unknown_kind_and_missing_weights_are_said_in_one_line(monkeypatch):
    with pytest.raises(ValueError, match="wanted one of st-lpips, lpips, efficientnet-lite0"):
        PerceptualLoss("vgg")

    def absent() -> None:
        raise MissingWeights('ST-LPIPS needs the weights in package stlpips_pytorch: pip install "clipdit[metrics]"')

    monkeypatch.setattr(losses, "STLPIPS", absent)
    with pytest.raises(ValueError, match="pip install") as missing:
        PerceptualLoss("st-lpips")
    assert "\n" not in str(missing.value)
