"""The CLIP image encoder (Radford et al. 2021): transformers' vision tower, reading what the source shows.

Images come in as [-1, 1] and are resized and normalised inside, on the device and differentiably, so that training can also ask
how similar two decoded images are in CLIP's eyes.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from clipdit.shapes import ClipEmbedding, ClipTokens, Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's pixel statistics, for images in [0, 1]."""


class ClipImageEncoder(nn.Module):
    """Images -> (patch tokens after the last layer norm (B, M, E), projected embedding (B, P))."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: CLIPVisionModelWithProjection):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).reshape(1, 3, 1, 1), persistent=False)

    @property
    def token_width(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def embedding_width(self) -> int:
        return int(self.model.config.projection_dim)

    @property
    def tokens(self) -> int:
        """M: patch tokens an image."""
        return (int(self.model.config.image_size) // int(self.model.config.patch_size)) ** 2

    def forward(self, image: Image) -> tuple[ClipTokens, ClipEmbedding]:
        return encode(self.model, self.mean, self.std, image)


def pixels(image: Image, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """[-1, 1] -> CLIP's input: resized (bicubic with antialiasing, as CLIP's own preprocessing), normalised.

    The whole image is squeezed to the square that CLIP takes: a centre crop would hide the margins of the source."""
    if image.shape[-2:] != (size, size):
        image = F.interpolate(image.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return (image / 2 + 0.5 - mean) / std


def encode(model: CLIPVisionModelWithProjection, mean: Tensor, std: Tensor, image: Image) -> tuple[ClipTokens, ClipEmbedding]:
    values = pixels(image, int(model.config.image_size), mean, std).to(model.dtype)
    out = model.vision_model(pixel_values=values)
    tokens = model.vision_model.post_layernorm(out.last_hidden_state[:, 1:])  # the pooled token went through it already
    return tokens, model.visual_projection(out.pooler_output)


def load_clip(where: str | Path) -> CLIPVisionModelWithProjection:
    """CLIP's vision tower from a hub id or a folder: of CLIP, of its vision tower, or one with `image_encoder/` or `clip/` inside.

    ValueError, one line, when there is none. Safetensors only."""
    folder = Path(where)
    name = str(where)
    if folder.is_dir():
        inner = [folder / part for part in ("image_encoder", "clip") if (folder / part / "config.json").exists()]
        name = str(inner[0] if inner else folder)
        if not (Path(name) / "config.json").exists():
            raise ValueError(
                f"{folder} holds no config.json, so it is no CLIP; give a CLIP folder, a checkpoint folder or a hub id"
            )
    try:
        return CLIPVisionModelWithProjection.from_pretrained(name, use_safetensors=True)
    except OSError as error:
        raise ValueError(f"no CLIP image encoder at {where}: {str(error).strip().splitlines()[0]}") from error
