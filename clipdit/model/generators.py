"""The generators of Pix2Pix and Pix2PixHD, in the seat of the DiT: the same questions, so the same folder, backends and graphs.

They work on pixels (`clipdit.model.pixels`), read the source as the DiT's "concat" does, and say what the image is
(`clipdit.direct`). Normalisation is by image: so it is in Pix2PixHD, and Pix2Pix samples so, with the statistics of a batch of
one. An image does not depend on its neighbours, in training either.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  (diffusers looks beside a class for how to load it)
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from clipdit.backend import Condition
from clipdit.model.network import Context, Modulation, Network
from clipdit.shapes import Image, Latent, Time


class Generator(Network):
    """What a generator is asked as if it were a DiT. A subclass makes the image: `generate`."""

    reads_clip, reads_latent = False, True
    blocks = ()

    def generate(self, source: Image, noise: Latent) -> Image:
        """(B, 3, H, W) in [-1, 1] and standard Gaussians of that shape -> (B, 3, H, W) in [-1, 1]."""
        raise NotImplementedError

    def context(self, condition: Condition) -> Context:
        return Context(source_tokens=condition.latent, pooled=None)

    def modulation(self, t: Time, context: Context) -> Modulation:
        """There is none; what stands for it has one number an image and place, since a graph must have tensors."""
        return Modulation(blocks=t.reshape(-1, 1, 1, 1).expand(-1, 1, 6, 1), final=t.reshape(-1, 1, 1).expand(-1, 2, 1))

    @property
    def modulation_table(self) -> Tensor:
        """(1, 6, 1), the shape of an image's modulation."""
        return torch.zeros(1, 6, 1)

    def positions(self, height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
        return ()

    def forward_prepared(
        self, x: Latent, modulation: Modulation, context: Context, positions: tuple[Tensor, ...] | None = None
    ) -> Latent:
        assert context.source_tokens is not None
        return self.generate(context.source_tokens, x)

    def forward(self, x: Latent, t: Time, condition: Condition) -> Latent:
        """ValueError when the size is not one that it takes."""
        multiple, (height, width) = self.config["patch"], x.shape[-2:]
        if x.shape != condition.latent.shape or x.shape[1] != 3 or height % multiple or width % multiple:
            got = " x ".join(map(str, condition.latent.shape[1:]))
            raise ValueError(f"source is {got}; this generator takes 3 channels and sides that are multiples of {multiple}")
        return self.generate(condition.latent, x)


def as_published(network: nn.Module) -> None:
    """N(0, 0.02) for weights, N(1, 0.02) for the scales of norms, as both codes; zero for biases, which Pix2PixHD's leaves as
    PyTorch makes them."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.InstanceNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.02)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            nn.init.zeros_(bias)


class UNet(Generator):
    """The U-Net of Pix2Pix (Isola et al. 2017, sec. 6.1.1): C64-C128-C256-C512-C512-C512-C512-C512 down, CD512-CD512-CD512-C512-
    C256-C128-C64 up, 4 x 4 convolutions of stride 2, LeakyReLU 0.2 down and ReLU up, each level handed across.

    Its randomness is dropout, in use, too: the noise of the seed says by its signs what is dropped, half of all.

    Args:
        width: channels of the first level; 64 as published. Deeper levels have 2, 4, 8, 8 ... times as many.
        levels: halvings, 8 as published for 256 px: to a single cell.
        dropout: of the three deepest levels on the way up. Without it a source has one image.
    """

    @register_to_config
    def __init__(
        self,
        *,
        width: int = 64,
        levels: int = 8,
        dropout: bool = True,
        latent_channels: int = 3,
        patch: int = 256,
        conditioning: str = "concat",
        clip_token_width: int = 1,
        clip_embedding_width: int = 1,
    ):
        super().__init__()
        if width < 1 or levels < 2 or patch != 2**levels:
            raise ValueError(f"width {width}, {levels} levels, patch {patch}; wanted width 1 or more, 2 levels or more, 2^levels")
        widths = [width * min(8, 2**level) for level in range(levels)]
        down, up = nn.ModuleList(), nn.ModuleList()
        for level, out in enumerate(widths):
            normed = 0 < level < levels - 1
            conv = nn.Conv2d(widths[level - 1] if level else 3, out, 4, 2, 1, bias=not normed)
            down.append(nn.Sequential(conv, nn.InstanceNorm2d(out, affine=True)) if normed else conv)
        for level in reversed(range(levels)):
            deepest, out = level == levels - 1, widths[level - 1] if level else 3
            conv = nn.ConvTranspose2d(widths[level] * (1 if deepest else 2), out, 4, 2, 1, bias=not level)
            up.append(nn.Sequential(conv, nn.InstanceNorm2d(out, affine=True)) if level else conv)
        self.down, self.up = down, up
        as_published(self)

    def generate(self, source: Image, noise: Latent) -> Image:
        kept, x = [], source
        for level, layer in enumerate(self.down):
            x = layer(F.leaky_relu(x, 0.2) if level else x)
            kept.append(x)
        drop = _dropout_by(noise) if self.config["dropout"] else lambda y: y
        x = kept.pop()
        for step, layer in enumerate(self.up):
            x = layer(F.relu(x))
            if kept:
                x = torch.cat(((drop(x) if step < 3 else x), kept.pop()), dim=1)
        return torch.tanh(x)


def _dropout_by(noise: Latent) -> Callable[[Tensor], Tensor]:
    """Dropout with probability 1/2 that takes its decisions from the signs of `noise`, one after another; from the beginning
    again where there are more decisions than numbers."""
    signs, begin = (noise > 0).flatten(1), 0

    def drop(y: Tensor) -> Tensor:
        nonlocal begin
        count = math.prod(y.shape[1:])
        end = begin + count
        keep = signs.repeat(1, math.ceil(end / signs.shape[1]))[:, begin:end].reshape(y.shape)
        begin = end % signs.shape[1]
        return y * keep.to(y.dtype) * 2

    return drop


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with reflected borders beside the identity."""

    def __init__(self, width: int):
        super().__init__()
        layers: list[nn.Module] = []
        for last in (False, True):
            conv = nn.Conv2d(width, width, 3)
            layers += [nn.ReflectionPad2d(1), conv, nn.InstanceNorm2d(width), *([] if last else [nn.ReLU()])]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class GlobalGenerator(Generator):
    """The global generator of Pix2PixHD (Wang et al. 2018, sec. 7.1.1): c7s1-64, d128, d256, d512, d1024, R1024 nine times, u512,
    u256, u128, u64, c7s1-3. It has no randomness: a source has one image.

    Args:
        width: channels at full resolution; 64 as published. downs: halvings; 4 as published. residuals: 9 as published.
    """

    @register_to_config
    def __init__(
        self,
        *,
        width: int = 64,
        downs: int = 4,
        residuals: int = 9,
        latent_channels: int = 3,
        patch: int = 16,
        conditioning: str = "concat",
        clip_token_width: int = 1,
        clip_embedding_width: int = 1,
    ):
        super().__init__()
        if min(width, downs) < 1 or residuals < 0 or patch != 2**downs:
            got = f"width {width}, {downs} downs, {residuals} residuals, patch {patch}"
            raise ValueError(f"{got}; wanted at least 1, 1 and 0, and 2^downs")
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), nn.InstanceNorm2d(width), nn.ReLU()]
        for level in range(downs):
            below, above = width * 2**level, width * 2 ** (level + 1)
            layers += [nn.Conv2d(below, above, 3, 2, 1), nn.InstanceNorm2d(above), nn.ReLU()]
        layers += [ResidualBlock(width * 2**downs) for _ in range(residuals)]
        for level in reversed(range(downs)):
            above, below = width * 2 ** (level + 1), width * 2**level
            layers += [nn.ConvTranspose2d(above, below, 3, 2, 1, output_padding=1), nn.InstanceNorm2d(below), nn.ReLU()]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        as_published(self)

    def generate(self, source: Image, noise: Latent) -> Image:
        return self.layers(source)
