"""Trains a small CLIP on what a data folder holds: both images of a pair and their names (names.jsonl).

Symmetric InfoNCE (Radford et al. 2021, fig. 3) between names and targets, names and sources, and sources and targets. The last
two are ours: the encoder will read sources (line drawings), and has to see in them what it sees in the finished picture.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from clipdit.data.layouts import Pair
from clipdit.files import replace_folder_contents
from clipdit.images import to_float, write_image
from clipdit.model.clip import MEAN, STD, pixels
from clipdit.sheets import contact_sheet
from clipdit.train.order import batch_indices, step_generator
from clipdit.train.state import save_tensors
from clipdit.train.task import Batch, Losses


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """The two towers."""

    image_size: int = 128
    """Side of the square that the vision tower reads, pixels."""
    patch_size: int = 16
    """Side of its patches, pixels."""
    width: int = 192
    """Of the vision tower."""
    layers: int = 4
    """Of the vision tower."""
    text_width: int = 128
    """Of the text tower."""
    text_layers: int = 2
    """Of the text tower."""
    embedding: int = 128
    """Width of the common space."""
    vocabulary: int = 2000
    """Byte-pair pieces learnt from the names, at most."""
    max_words: int = 32
    """Text pieces read of a caption."""
    scale_range: float = 0.15
    """Augmentation: images are scaled by up to this share either way, and shifted and turned (by up to 15 degrees)."""

    def __post_init__(self) -> None:
        for name in ("width", "text_width"):
            if getattr(self, name) < 64 or getattr(self, name) % 64:
                raise ValueError(f"model.{name} is {getattr(self, name)}; wanted a multiple of 64, the width of a head")
        for name in ("image_size", "patch_size", "layers", "text_layers", "embedding", "vocabulary", "max_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; wanted at least 1")
        if self.image_size % self.patch_size:
            raise ValueError(f"model.image_size {self.image_size} does not divide into patches of {self.patch_size}")
        if not 0 <= self.scale_range < 1:
            raise ValueError(f"model.scale_range is {self.scale_range}; wanted a number in [0, 1)")


def train_tokenizer(texts: Sequence[str], settings: ClipSettings) -> CLIPTokenizer:
    """CLIP's tokenizer (lower-cased byte-pair encoding with </w> at the end of words) learnt on `texts`."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE(unk_token=end, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[start, end],
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m) for m in model["merges"]]
    return CLIPTokenizer(
        vocab=model["vocab"],
        merges=merges,  # pyright: ignore[reportArgumentType]  (typed as text, taken as pairs)
        model_max_length=settings.max_words,
    )


class ClipModule(nn.Module):
    """CLIP with its losses."""

    mean: Tensor
    std: Tensor

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip
        vision = cast(CLIPVisionConfig, clip.config.vision_config)
        self.size_px = cast(int, vision.image_size)
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).reshape(1, 3, 1, 1), persistent=False)

    def images(self, image_u8: Tensor, theta: Tensor) -> Float[Tensor, "B P"]:
        """Unit embeddings of images moved by the affine maps `theta` (B, 2, 3)."""
        image = to_float(image_u8)
        grid = F.affine_grid(theta, list(image.shape), align_corners=False)
        image = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
        out = self.clip.vision_model(pixel_values=pixels(image, self.size_px, self.mean, self.std))
        return F.normalize(self.clip.visual_projection(out.pooler_output).float(), dim=-1)

    def forward(self, batch: Batch) -> Losses:
        source, target = (self.images(batch[side], batch[f"{side}_theta"]) for side in ("source", "target"))
        out = self.clip.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        text = F.normalize(self.clip.text_projection(out.pooler_output).float(), dim=-1)
        scale = self.clip.logit_scale.clamp(max=4.6).exp()  # at most 100, as in the paper
        return {
            "target_text": contrast(target, text, scale),
            "source_text": contrast(source, text, scale),
            "source_target": contrast(source, target, scale),
        }


def contrast(a: Float[Tensor, "B P"], b: Float[Tensor, "B P"], scale: Tensor) -> Float[Tensor, "B"]:
    """Symmetric InfoNCE of matching rows, one value an image."""
    logits = scale * a @ b.T
    matches = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, matches, reduction="none") + F.cross_entropy(logits.T, matches, reduction="none")) / 2


def read_captions(folder: Path, pairs: Sequence[Pair]) -> list[list[str]]:
    """For each pair its name first, then its keywords, from names.jsonl (id, name, keywords). ValueError if one has none."""
    path = folder / "names.jsonl"
    if not path.exists():
        raise ValueError(f"{path} is missing; CLIP learns from names: one JSON object a line with id, name and keywords")
    known = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            known[row["id"]] = [row["name"], *[k for k in row.get("keywords", []) if k != row["name"]]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number} is no JSON object with id and name") from error
    nameless = [pair.id for pair in pairs if Path(pair.id).name not in known]
    if nameless:
        raise ValueError(f"{path} has no name for {nameless[0]} and {len(nameless) - 1} more of {len(pairs)} pairs")
    return [known[Path(pair.id).name] for pair in pairs]


class ClipTask:
    """See clipdit.train.task.Task."""

    contested: frozenset[str] = frozenset()

    def __init__(
        self,
        settings: ClipSettings,
        train: UInt8[Tensor, "n 2 3 H W"],
        captions: list[list[str]],
        val: UInt8[Tensor, "m 2 3 H W"],
        val_captions: list[list[str]],
        batch: int,
        seed: int,
    ):
        torch.manual_seed(seed)
        self.settings, self.batch, self.seed = settings, batch, seed
        self.pixels, self.captions, self.val, self.val_captions = train, captions, val, val_captions
        self.tokenizer = train_tokenizer([word for words in captions for word in words], settings)
        self.clip = CLIPModel(self._config())
        self.module = ClipModule(self.clip)
        self.weights = {"target_text": 1.0, "source_text": 1.0, "source_target": 1.0}

    def _config(self) -> CLIPConfig:
        s = self.settings

        def special(token: str) -> int:
            return cast(int, self.tokenizer.convert_tokens_to_ids(token))

        text = CLIPTextConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=s.text_width,
            intermediate_size=4 * s.text_width,
            num_hidden_layers=s.text_layers,
            num_attention_heads=s.text_width // 64,
            max_position_embeddings=s.max_words,
            projection_dim=s.embedding,
            bos_token_id=special("<|startoftext|>"),
            eos_token_id=special("<|endoftext|>"),
            pad_token_id=special("<|endoftext|>"),
        )
        vision = CLIPVisionConfig(
            hidden_size=s.width,
            intermediate_size=4 * s.width,
            num_hidden_layers=s.layers,
            num_attention_heads=s.width // 64,
            image_size=s.image_size,
            patch_size=s.patch_size,
            projection_dim=s.embedding,
        )
        return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=s.embedding)

    def draw(self, step: int) -> Batch:
        generator = step_generator(self.seed, step)
        indices = batch_indices(len(self.pixels), self.batch, step, self.seed)
        words = random.Random((self.seed << 32) + step)  # a caption is the name and some of the keywords, in any order
        captions = []
        for i in indices:
            name, *keywords = self.captions[i]
            captions.append(", ".join([name, *words.sample(keywords, words.randint(0, min(3, len(keywords))))]))
        chosen = self.pixels[indices]
        return {
            "source": chosen[:, 0],
            "target": chosen[:, 1],
            "source_theta": self._theta(generator),
            "target_theta": self._theta(generator),
            **self._tokens(captions),
        }

    def _tokens(self, captions: Sequence[str]) -> Batch:
        length = self.settings.max_words
        out = self.tokenizer(list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return {"input_ids": out["input_ids"], "attention_mask": out["attention_mask"]}

    def _theta(self, generator: torch.Generator) -> Float[Tensor, "B two three"]:
        def uniform(limit: float) -> Tensor:
            return (2 * torch.rand(self.batch, generator=generator) - 1) * limit

        angle, scale = torch.deg2rad(uniform(15.0)), 1 + uniform(self.settings.scale_range)
        flip = torch.where(torch.rand(self.batch, generator=generator) < 0.5, -1.0, 1.0)
        cos, sin, zero = scale * angle.cos(), scale * angle.sin(), uniform(0.08)
        return torch.stack((flip * cos, -sin, zero, flip * sin, cos, uniform(0.08)), dim=1).reshape(-1, 2, 3)

    def save(self, folder: Path) -> None:
        target = folder / "clip"
        if not (target / "config.json").exists():
            replace_folder_contents(target, self._write_settings, last="config.json")
        save_tensors(target / "model.safetensors", self.clip.state_dict())

    def _write_settings(self, folder: Path) -> None:
        """All files but the weights."""
        (folder / "config.json").write_text(self.clip.config.to_json_string(), encoding="utf-8")
        size = {"height": self.settings.image_size, "width": self.settings.image_size}
        CLIPImageProcessor(size=size, do_center_crop=False, image_mean=list(MEAN), image_std=list(STD)).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def sheet(self, path: Path) -> None:
        """Held-out drawings and the targets (of training and held-out) that CLIP holds for most similar."""
        device = next(self.clip.parameters()).device
        everything = torch.cat((self.pixels[:, 1], self.val[:, 1]))
        targets = self._embed(everything, device)
        queries = self.val[:8, 0]
        found = (self._embed(queries, device) @ targets.T).topk(5).indices
        columns = {"source": queries, "its target": self.val[:8, 1]}
        columns |= {f"nearest {k + 1}": everything[found[:, k]] for k in range(5)}
        labels = [captions[0] for captions in self.val_captions[:8]]
        write_image(path, contact_sheet(columns, labels=labels, tile_px=96))

    def _embed(self, images: Tensor, device: torch.device) -> Tensor:
        still = torch.eye(2, 3)
        parts = [self.module.images(part.to(device), still.expand(len(part), 2, 3).to(device)).cpu() for part in images.split(64)]
        return torch.cat(parts)
