"""PSNR and SSIM have their textbook values."""

import math

import pytest
import torch
from torchvision.transforms.v2 import functional as tvf

from clipdit.metrics.pixels import MAX_PSNR_DB, psnr, ssim


@pytest.fixture
def image() -> torch.Tensor:
    """A grating with a slope, (1, 3, 48, 48)."""
    x = torch.arange(48.0)
    waves = 127 + 60 * torch.sin(x[:, None] / 2) * torch.cos(x[None, :] / 3) + x[None, :]
    return torch.stack([waves, waves.flip(0), waves.T]).clamp(0, 255).to(torch.uint8)[None]


def test_psnr_of_a_known_error():
    target = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    output = target.clone()
    output[0] += 10
    output[1, :, ::2] += 20  # half of the pixels: MSE 200
    assert psnr(output, target).tolist() == pytest.approx([10 * math.log10(255**2 / 100), 10 * math.log10(255**2 / 200)])


def test_equal_images_score_the_best(image):
    assert psnr(image, image).tolist() == [MAX_PSNR_DB]
    assert ssim(image, image).tolist() == pytest.approx([1.0])


def test_ssim_of_two_plain_images_is_its_luminance_term():
    a, b = torch.full((1, 3, 16, 20), 200, dtype=torch.uint8), torch.full((1, 3, 16, 20), 150, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    # the variance of a plain area is a difference of numbers of about 72^2: in float32 that leaves 1e-5 of SSIM
    assert ssim(a, b).item() == pytest.approx((2 * 200 * 150 + c1) / (200**2 + 150**2 + c1), abs=5e-5)


def test_ssim_agrees_with_its_definition_window_by_window(image):
    other = tvf.gaussian_blur(image, [5, 5], [1.0, 1.0])
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for channel in range(3):
        for top in range(0, 38, 9):
            for left in range(0, 38, 9):
                x = image[0, channel, top : top + 11, left : left + 11].double()
                y = other[0, channel, top : top + 11, left : left + 11].double()
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy, cov = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum(), (window * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    windows = [
        ssim(image[..., top : top + 11, left : left + 11], other[..., top : top + 11, left : left + 11]).item()
        for top in range(0, 38, 9)
        for left in range(0, 38, 9)
    ]
    assert sum(windows) / len(windows) == pytest.approx(float(torch.stack(values).mean()), abs=1e-5)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_more_noise_and_more_blur_are_farther(metric, image):
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    noisy = [metric((image + s * noise).clamp(0, 255).round().to(torch.uint8), image).item() for s in (2, 8, 32)]
    blurred = [metric(tvf.gaussian_blur(image, [9, 9], [s, s]), image).item() for s in (0.5, 1.0, 2.0)]
    assert noisy == sorted(noisy, reverse=True)
    assert blurred == sorted(blurred, reverse=True)


def test_an_image_smaller_than_the_window_is_refused(image):
    with pytest.raises(ValueError, match="11 px a side"):
        ssim(image[..., :8, :8], image[..., :8, :8])
