"""The adversary of a decoder: it learns to tell patches of images from patches of what is decoded."""

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

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


def adversarial_losses(discriminator: Discriminator, output: Image, image: Image) -> dict[str, Float[Tensor, "B"]]:
    """Hinge losses (Lim & Ye 2017), by image: `adversary`, of which the gradient goes to `output` alone, and `discriminator`, of
    which it goes to the discriminator alone. So both are trained in one backward pass."""
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    fooled = functional_call(discriminator, frozen, (output,))
    real, fake = discriminator(torch.cat((image, output.detach()))).float().chunk(2)
    return {
        "adversary": -fooled.float().mean((1, 2, 3)),
        "discriminator": (F.relu(1 - real) + F.relu(1 + fake)).mean((1, 2, 3)),
    }
