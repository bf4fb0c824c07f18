"""Distances pixel by pixel: PSNR and SSIM. They reward blur where the answer is uncertain; never read them alone."""

import torch
from jaxtyping import Float
from torch import Tensor

from clipdit.shapes import ImageU8

MAX_PSNR_DB = 100.0
"""What equal images score, instead of infinity; one pixel of a 128 px image wrong by one level in one channel scores 95 dB."""


def psnr(output_u8: ImageU8, target_u8: ImageU8) -> Float[Tensor, "B"]:
    """Peak signal-to-noise ratio by image, dB: 10 log10(255^2 / MSE) over all pixels and channels. Higher is nearer."""
    error = (output_u8.double() - target_u8.double()).square().mean(dim=(1, 2, 3))
    return (10 * (255**2 / error).log10()).clamp(max=MAX_PSNR_DB).float()


def ssim(output_u8: ImageU8, target_u8: ImageU8) -> Float[Tensor, "B"]:
    """Structural similarity by image (Wang et al. 2004): 11 x 11 Gaussian window of sigma 1.5 px, K = 0.01 and 0.03, peak 255,
    the mean over the channels and over the places where the window lies wholly inside. 1 is equal; higher is nearer."""
    height, width = output_u8.shape[-2:]
    if min(height, width) < 11:
        raise ValueError(f"image is {width} x {height}; SSIM needs 11 px a side")
    blur_rows, blur_columns = _gaussian_window(height).to(output_u8.device), _gaussian_window(width).T.to(output_u8.device)

    def blur(x: Tensor) -> Tensor:
        return blur_rows @ x @ blur_columns  # on CPUs much faster than a convolution with one channel

    # about zero, so that E[x^2] - E[x]^2 keeps its bits in float32 where an image is flat
    x, y = output_u8.float() - 128, target_u8.float() - 128
    mean_x, mean_y = blur(x), blur(y)
    variances = blur(x * x + y * y) - mean_x**2 - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    structure = (2 * covariance + c2) / (variances + c2)
    mean_x, mean_y = mean_x + 128, mean_y + 128
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _gaussian_window(size: int) -> Float[Tensor, "_ _"]:
    """(size - 10, size): row i holds the 11 weights of the window that begins at i."""
    offset = torch.arange(size)[None, :] - torch.arange(size - 10)[:, None] - 5
    weights = torch.exp(-(offset.double() ** 2) / (2 * 1.5**2)) * (offset.abs() <= 5)
    return (weights / weights.sum(dim=1, keepdim=True)).float()
