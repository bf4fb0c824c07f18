"""Perceptual distances: LPIPS (Zhang et al. 2018) and its shift-tolerant twin ST-LPIPS (Ghildyal & Liu 2022).

Both compare unit-length features of a network at five depths: d = sum_k mean_hw sum_c w_kc (f0 - f1)^2. As every w is at
least 0, this is the squared distance between two vectors, one per image; `embed` returns that vector, so that an image
which is compared with many others goes through the network once. 0 is equal, about 0.5 and more is unlike; lower is nearer.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from clipdit.metrics.weights import MissingWeights, load_weights, packaged_file
from clipdit.shapes import Image

IMAGENET_SHIFT = (-0.030, -0.088, -0.188)
"""ImageNet's mean and deviation, for images in [-1, 1] (LPIPS, reference implementation)."""
IMAGENET_SCALE = (0.458, 0.448, 0.450)

SMALLEST_SIDE_PX = 32
"""Below this the deeper layers have no pixel left to look at."""


class PerceptualDistance(nn.Module):
    """A frozen AlexNet in five stages, whose outputs are compared, with a weight for each channel.

    Gradients flow through the network to the images, not to its weights.

    Args:
        stages: five, with one convolution each.
        convolutions: (weight, bias) of those.
        channel_weights: the weights of the five outputs' channels.

    Raises ValueError or RuntimeError when shapes do not fit.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, stages: list[nn.Sequential], convolutions: list[tuple[Tensor, Tensor]], channel_weights: list[Tensor]
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        own = [layer for layer in self.modules() if isinstance(layer, nn.Conv2d)]
        for k, (layer, (weight, bias), channels) in enumerate(zip(own, convolutions, channel_weights, strict=True)):
            layer.load_state_dict({"weight": weight, "bias": bias})
            self.register_buffer(f"weight{k}", channels.reshape(layer.out_channels).clamp(min=0))
        self.register_buffer("shift", torch.tensor(IMAGENET_SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(IMAGENET_SCALE)[:, None, None])
        self.eval().requires_grad_(False)

    def embed(self, image: Image) -> Float[Tensor, "B F"]:
        """Image in [-1, 1] -> the vector whose squared distance to another image's is the perceptual distance."""
        if min(image.shape[-2:]) < SMALLEST_SIDE_PX:
            raise ValueError(
                f"image is {image.shape[-1]} x {image.shape[-2]}; perceptual distances need {SMALLEST_SIDE_PX} px a side"
            )
        vectors, features = [], (image - self.shift) / self.scale
        for k, stage in enumerate(self.stages):
            features = stage(features)
            # vector_norm, not sqrt(sum of squares): its gradient at an all-zero pixel is 0 rather than NaN
            unit = features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)
            share = self.get_buffer(f"weight{k}") / (features.shape[-2] * features.shape[-1])
            vectors.append((unit * share.sqrt()[:, None, None]).flatten(1))
        return torch.cat(vectors, dim=1)

    def forward(self, image: Image, other: Image) -> Float[Tensor, "B"]:
        """Distance between image i and other i, both in [-1, 1]; differentiable in both."""
        return (self.embed(image) - self.embed(other)).square().sum(dim=1)


class BlurPool(nn.Module):
    """Every second pixel of the image blurred with (1 2 1)/4, so that a shift by one pixel changes little (Zhang 2019).

    Two pixels of reflection a side, one more than the filter asks for, as ST-LPIPS was trained.
    """

    filter: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filter", torch.outer(line, line).expand(channels, 1, 3, 3).clone())

    def forward(self, x: Float[Tensor, "B _ _ _"]) -> Float[Tensor, "B _ _ _"]:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filter, stride=2, groups=x.shape[1])


class STLPIPS(PerceptualDistance):
    """ST-LPIPS with the AlexNet trunk: strides moved from the convolutions into blurred pooling, blur before the ReLU.

    Weights: package stlpips-pytorch 0.0.2 (BSD 2-clause); the network is written from its tensor shapes and the paper
    (arXiv 2207.13686, sec. 4). Report it as ST-LPIPS, never as LPIPS: the numbers differ.
    """

    def __init__(self, weights: Path | None = None) -> None:
        file = weights or packaged_file("stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth", what="ST-LPIPS")
        # the file counts layers through all stages: net.slice2.5 is the convolution of stage 2
        names = ("net.slice1.0", "net.slice2.5", "net.slice3.9", "net.slice4.11", "net.slice5.13")
        stages = [
            nn.Sequential(nn.Conv2d(3, 64, 11, padding=2), BlurPool(64), nn.ReLU()),
            nn.Sequential(nn.MaxPool2d(3, stride=1), BlurPool(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
            nn.Sequential(nn.MaxPool2d(3, stride=1), BlurPool(192), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        ]
        state = load_weights(file)
        with _shapes_from(file, "ST-LPIPS (alex)"):
            super().__init__(stages, _convolutions(state, names), [state[f"lin{k}.model.1.weight"] for k in range(5)])


LPIPS_TRUNK = "alexnet-owt-7be5be79.pth"
"""torchvision's name of the ImageNet weights that LPIPS (alex) stands on."""


def lpips_trunk_file() -> Path:
    """Where the trunk of LPIPS is looked for: torch hub's folder, where torchvision's own download would put it."""
    return Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_TRUNK


class LPIPS(PerceptualDistance):
    """LPIPS 0.1 with the AlexNet trunk. Channel weights: package lpips (BSD 2-clause). The trunk is torchvision's, downloaded
    once by the user.

    Raises MissingWeights when the package or the trunk file is absent (nothing is downloaded here), ValueError when a file is
    something else.
    """

    def __init__(self, trunk: Path | None = None) -> None:
        linear = packaged_file("lpips", "weights/v0.1/alex.pth", what="LPIPS")
        file = trunk or lpips_trunk_file()
        if not file.is_file():
            place = f"~/{file.relative_to(Path.home())}" if file.is_relative_to(Path.home()) else file
            url = f"https://download.pytorch.org/models/{LPIPS_TRUNK}"
            raise MissingWeights(f"LPIPS (alex) needs its trunk weights, which are absent: download {url} to {place}")
        stages = [
            nn.Sequential(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU()),
            nn.Sequential(nn.MaxPool2d(3, stride=2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
            nn.Sequential(nn.MaxPool2d(3, stride=2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        ]
        state, channels = load_weights(file), load_weights(linear)
        with _shapes_from(file, "torchvision's AlexNet"):
            convolutions = _convolutions(state, [f"features.{layer}" for layer in (0, 3, 6, 8, 10)])
            super().__init__(stages, convolutions, [channels[f"lin{k}.model.1.weight"] for k in range(5)])


def _convolutions(state: dict[str, Tensor], names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    return [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in names]


@contextlib.contextmanager
def _shapes_from(file: Path, network: str) -> Iterator[None]:
    """A tensor that is missing or of another shape becomes one line that names the file."""
    try:
        yield
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{file} does not hold the weights of {network}: {str(error).splitlines()[0]}") from error
