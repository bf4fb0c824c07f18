"""Adversaries: networks that learn to tell patches of images from patches of what a decoder or a generator makes."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from clipdit.model.generators import as_published
from clipdit.shapes import Image


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one score for every 8 x 8 pixels, each of a patch of 54 x 54, above 0 for "image".

    Group normalisation, not batch normalisation: an image's scores do not depend on its batch."""

    def __init__(self, channels: int = 32):
        super().__init__()
        layers: list[nn.Module] = []
        widths = (3, channels, 2 * channels, 4 * channels, 4 * channels)
        for i, (below, above) in enumerate(itertools.pairwise(widths)):
            halve = i < 3
            layers.append(nn.Conv2d(below, above, 4 if halve else 3, 2 if halve else 1, 1))
            layers += [nn.GroupNorm(8, above)] if i else []
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, 1, 1))

    def forward(self, image: Image) -> Float[Tensor, "B one h w"]:
        return self.layers(image)


class PatchGAN(nn.Module):
    """The discriminator of Pix2Pix (Isola et al. 2017, sec. 6.1.2: C64-C128-C256-C512, each score of a patch of 70 x 70 pixels)
    and, with other borders and norms without parameters, of Pix2PixHD.

    Args:
        channels: of what is judged: source and image, one on the other.
        width: 64 as published. layers: convolutions of stride 2; 3 as published.
        affine: norms have scales and shifts. padding: of each convolution; 1 in Pix2Pix, 2 in Pix2PixHD.

    Normalisation is by image, as in `clipdit.model.generators`.
    """

    def __init__(self, channels: int = 6, width: int = 64, layers: int = 3, *, affine: bool = True, padding: int = 1):
        super().__init__()
        stages: list[nn.Module] = []
        widths = [channels, *(width * min(8, 2**i) for i in range(layers + 1))]
        for i, (below, above) in enumerate(itertools.pairwise(widths)):
            conv = nn.Conv2d(below, above, 4, 2 if i < layers else 1, padding)
            norm = [nn.InstanceNorm2d(above, affine=affine)] if i else []
            stages.append(nn.Sequential(conv, *norm, nn.LeakyReLU(0.2)))
        stages.append(nn.Conv2d(widths[-1], 1, 4, 1, padding))
        self.stages = nn.ModuleList(stages)
        as_published(self)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, channels, H, W) -> what each stage makes, the scores (B, 1, h, w) last."""
        made = [image]
        for stage in self.stages:
            made.append(stage(made[-1]))
        return made[1:]


class MultiScale(nn.Module):
    """Pix2PixHD's (Wang et al. 2018, sec. 3.2): equal discriminators, each of an image half as large as the one before."""

    def __init__(self, scales: int, make: Callable[[], PatchGAN]):
        super().__init__()
        self.judges = nn.ModuleList(make() for _ in range(scales))

    def forward(self, image: Tensor) -> list[list[Tensor]]:
        made = []
        for judge in self.judges:
            made.append(judge(image))
            image = F.avg_pool2d(image, 3, 2, 1, count_include_pad=False)
        return made


def frozen_call(network: nn.Module, *given: Tensor) -> Any:
    """`network(*given)` with constants for parameters: the gradient goes to what is given alone."""
    return functional_call(network, {name: parameter.detach() for name, parameter in network.named_parameters()}, given)


def adversarial_losses(discriminator: Discriminator, output: Image, image: Image) -> dict[str, Float[Tensor, "B"]]:
    """Hinge losses (Lim & Ye 2017), by image: `adversary`, of which the gradient goes to `output` alone, and `discriminator`, of
    which it goes to the discriminator alone. So both are trained in one backward pass."""
    fooled = frozen_call(discriminator, output)
    real, fake = discriminator(torch.cat((image, output.detach()))).float().chunk(2)
    return {
        "adversary": -fooled.float().mean((1, 2, 3)),
        "discriminator": (F.relu(1 - real) + F.relu(1 + fake)).mean((1, 2, 3)),
    }
