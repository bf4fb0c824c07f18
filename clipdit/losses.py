"""Losses on decoded images, added to the training objective: closeness in CLIP's eyes, and in a perceptual network's.

Each takes (output, target) in [-1, 1] and returns one value per image, so that the caller can weight and gate each image by
its noise level. Gradients flow to the output only; the target is a constant.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from clipdit.metrics.features import EfficientNetLite0
from clipdit.metrics.judges import ImageEncoder
from clipdit.metrics.perceptual import LPIPS, STLPIPS
from clipdit.shapes import Image

PerceptualKind = Literal["st-lpips", "lpips", "efficientnet-lite0"]


class ClipSimilarityLoss:
    """1 - cos(CLIP(output), CLIP(target)) on the pooled embeddings: 0 for equal directions, 2 for opposite ones.

    The encoder is held, not owned: freezing it and moving it to a device remain its owner's business.
    """

    def __init__(self, image_encoder: ImageEncoder) -> None:
        self.image_encoder = image_encoder

    def __call__(self, output: Image, target: Image) -> Float[Tensor, "B"]:
        with torch.no_grad():
            _, wanted = self.image_encoder(target)
        _, got = self.image_encoder(output)
        return 1 - F.cosine_similarity(got.float(), wanted.float(), dim=1)


class PerceptualLoss(nn.Module):
    """A frozen network's opinion of how far the output is from the target; 0 is equal.

    - "st-lpips": ST-LPIPS (alex), weights from a package; the usual choice here.
    - "lpips": LPIPS 0.1 (alex); its trunk must be on this machine.
    - "efficientnet-lite0": mean over the 7 stages of EfficientNet-Lite0 of the squared distance between unit-length features, at
      the image's own size. A quarter of the time of "st-lpips", and a worse guide: noise of one level on a plain ground costs
      0.7 times what a blur of sigma 2 px costs, where with "st-lpips" it is 0.003 times. "st-lpips" on a crop of half the
      side costs as little.

    Raises MissingWeights (a ValueError of one line: what to install or put where) when the weights are absent. Computes in
    float32 under autocast too: the distance of two near images is a small difference of large features.
    """

    def __init__(self, kind: str = "st-lpips") -> None:
        super().__init__()
        if kind not in get_args(PerceptualKind):
            raise ValueError(f"no perceptual loss {kind!r}; wanted one of {', '.join(get_args(PerceptualKind))}")
        self.kind = kind
        self.network = {"st-lpips": STLPIPS, "lpips": LPIPS, "efficientnet-lite0": EfficientNetLite0}[kind]()

    def forward(self, output: Image, target: Image) -> Float[Tensor, "B"]:
        with torch.autocast(output.device.type, enabled=False):
            with torch.no_grad():
                wanted = self._embed(target.float())
            got = self._embed(output.float())
            return (got - wanted).square().sum(dim=1)

    def _embed(self, image: Image) -> Float[Tensor, "B F"]:
        """A vector an image, whose squared distances are the loss."""
        if isinstance(self.network, EfficientNetLite0):
            *stages, _ = self.network.maps(image, resize=False)
            units = [F.normalize(m, dim=1).flatten(1) / (len(stages) * m.shape[2] * m.shape[3]) ** 0.5 for m in stages]
            return torch.cat(units, dim=1)
        return self.network.embed(image)
