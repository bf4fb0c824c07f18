"""The CLIP image encoder (Radford et al. 2021): transformers' vision tower, reading what the source shows.

Images come in as [-1, 1] and are resized and normalised inside, on the device and differentiably, so that training can also ask
how similar two decoded images are in CLIP's eyes.
"""

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

from clipdit.model.weights import fill, hub_errors, read_json, read_tensors, refused
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
        self.register_buffer("mean", torch.tensor(MEAN, device=model.device).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD, device=model.device).reshape(1, 3, 1, 1), persistent=False)

    @property
    def token_width(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def embedding_width(self) -> int:
        return int(self.model.config.projection_dim)

    @property
    def tokens(self) -> int:
        """M: patch tokens an image."""
        return (_side(self.model.config) // int(cast(int, self.model.config.patch_size))) ** 2

    @property
    def side(self) -> int:
        """Height and width of what the model sees, pixels; other images are resized to it."""
        return _side(self.model.config)

    def forward(self, image: Image) -> tuple[ClipTokens, ClipEmbedding]:
        return encode(self.model, self.mean, self.std, image)


def _side(config: CLIPVisionConfig) -> int:
    """CLIP's images are square, whatever else transformers allows."""
    return int(cast(int, config.image_size))


def pixels(image: Image, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """[-1, 1] -> CLIP's input: resized (bicubic with antialiasing, as CLIP's own preprocessing), normalised.

    The whole image is squeezed to the square that CLIP takes: a centre crop would hide the margins of the source."""
    if image.shape[-2:] != (size, size):
        image = F.interpolate(image.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return (image / 2 + 0.5 - mean) / std


def encode(model: CLIPVisionModelWithProjection, mean: Tensor, std: Tensor, image: Image) -> tuple[ClipTokens, ClipEmbedding]:
    values = pixels(image, _side(model.config), mean, std).to(model.dtype)
    out = model.vision_model(pixel_values=values)
    tokens = model.vision_model.post_layernorm(out.last_hidden_state[:, 1:])  # the pooled token went through it already
    return tokens, model.visual_projection(out.pooler_output)


def load_clip(where: str | Path) -> CLIPVisionModelWithProjection:
    """CLIP's vision tower in float32, from a hub id or a folder: CLIP's, its vision tower's, or one with `image_encoder/` or
    `clip/` inside. Safetensors only. ValueError, one line, when there is none."""
    folder = Path(where)
    if not folder.is_dir():
        return _from_hub(str(where))
    inner = [folder / part for part in ("image_encoder", "clip") if (folder / part / "config.json").exists()]
    if not inner and not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no config.json, so it is no CLIP; give a CLIP folder, a checkpoint folder or a hub id")
    return load_clip_folder(inner[0] if inner else folder)


def load_clip_folder(folder: Path, dtype: torch.dtype = torch.float32) -> CLIPVisionModelWithProjection:
    """The vision tower from the very folder that holds its config.json, or the whole CLIP's."""
    config = _vision_config(read_json(folder / "config.json"), folder)
    tensors = read_tensors(folder, "model")
    return fill(_empty(config, folder), {n: t for n, t in tensors.items() if n.startswith(OURS) and n != COUNTER}, folder, dtype)


OURS = ("vision_model.", "visual_projection.")
"""How the names of the vision tower's tensors begin, in a whole CLIP, too."""
COUNTER = "vision_model.embeddings.position_ids"
"""0, 1, 2 ... in files of 2022; computed since."""


def _vision_config(plain: dict, where: object) -> CLIPVisionConfig:
    """Of the vision tower. In a whole CLIP, the width of the embedding stands beside the two towers."""
    kind = plain.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(f"{where} is of type {kind}; wanted a CLIP (model_type clip or clip_vision_model)")
    with refused(f"{where}: config.json is damaged"):
        if kind == "clip_vision_model":
            return CLIPVisionConfig.from_dict(plain)
        full = CLIPConfig.from_dict(plain)
        vision = cast(CLIPVisionConfig, full.vision_config)
        vision.projection_dim = cast(int, full.projection_dim)
        return vision


def _empty(config: CLIPVisionConfig, where: object) -> CLIPVisionModelWithProjection:
    with refused(f"{where}: config.json is damaged"), init_empty_weights(include_buffers=False):
        return CLIPVisionModelWithProjection(config)


class _VisionHalf(CLIPVisionModelWithProjection):
    """Reads the file of a whole CLIP without a table of all that it does not need."""

    _keys_to_ignore_on_load_unexpected = [r"^text_", r"^logit_scale$"]  # noqa: RUF012  (transformers reads a list)


def _from_hub(name: str) -> CLIPVisionModelWithProjection:
    """transformers finds the safetensors, also those that the hub made of an older repository's pickle."""
    with hub_errors(name, "CLIP image encoder"):
        config = _vision_config(CLIPConfig.get_config_dict(name)[0], name)
        options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
        read, report = cast(tuple[nn.Module, dict], _VisionHalf.from_pretrained(name, config=config, **options))
        if report["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(report['missing_keys'])[0]}")
    return fill(_empty(config, name), read.state_dict(), name)
