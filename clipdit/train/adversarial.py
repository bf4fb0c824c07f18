"""Trains a generator against a discriminator on pairs: Pix2Pix (Isola et al. 2017) and Pix2PixHD (Wang et al. 2018).

Both networks learn in one backward pass, each from the other as it was before the step; the published code updates the
discriminator first and shows the generator the new one. Images are drawn and changed anew in every step, nothing is cached but
the pixels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clipdit.data.augment import Augment, augment
from clipdit.data.pixels import PixelStore
from clipdit.files import replace_folder_contents
from clipdit.images import to_float, to_u8, write_image
from clipdit.losses import PerceptualKind, PerceptualLoss
from clipdit.model.generators import Generator, GlobalGenerator, UNet
from clipdit.pipeline import ClipDiTPipeline, save_checkpoint
from clipdit.sampling import seeded_noise
from clipdit.shapes import Image
from clipdit.sheets import contact_sheet
from clipdit.train.discriminator import MultiScale, PatchGAN, frozen_call
from clipdit.train.order import batch_indices, step_generator
from clipdit.train.state import save_tensors
from clipdit.train.task import Batch, Losses
from clipdit.train.translation import Held

Contest = Literal["cross-entropy", "least-squares"]


@dataclass(frozen=True, kw_only=True)
class UNetSettings:
    """The U-Net of Pix2Pix."""

    width: int = 64
    """Channels of the first level; 64 as published."""
    levels: int | None = None
    """Halvings; as many as bring the size to one cell, at most 8, if not given."""
    dropout: bool = True
    """In the three deepest levels on the way up, in use too: the only randomness."""

    def make(self, size: int) -> Generator:
        """A fresh generator for images of this side, pixels. ValueError when it does not divide."""
        levels = self.levels or max(2, min(8, (size & -size).bit_length() - 1))
        if size % 2**levels:
            raise ValueError(f"pairs.size is {size}; wanted a multiple of {2**levels}, for {levels} halvings (model.levels)")
        return UNet(width=self.width, levels=levels, dropout=self.dropout, patch=2**levels)


@dataclass(frozen=True, kw_only=True)
class GlobalGeneratorSettings:
    """The global generator of Pix2PixHD."""

    width: int = 64
    """Channels at full resolution; 64 as published."""
    downs: int = 4
    """Halvings."""
    residuals: int = 9
    """Residual blocks at the lowest resolution."""

    def make(self, size: int) -> Generator:
        """A fresh generator for images of this side, pixels. ValueError when it does not divide."""
        if size % 2**self.downs or size < 2 ** (self.downs + 1):
            raise ValueError(f"pairs.size is {size}; wanted a multiple of {2**self.downs}, at least twice that (model.downs)")
        return GlobalGenerator(width=self.width, downs=self.downs, residuals=self.residuals, patch=2**self.downs)


@dataclass(frozen=True, kw_only=True)
class AdversarySettings:
    """The discriminator, and what else the generator is taught by. The defaults are Pix2Pix's."""

    contest: Contest = "cross-entropy"
    """What the two play for; Pix2PixHD's is least-squares."""
    l1: float = 100.0
    """Factor of the mean absolute difference to the target."""
    adversary: float = 1.0
    """Factor of what the discriminator thinks of the output."""
    feature_matching: float = 0.0
    """Factor of the difference between what the discriminator's layers make of output and target; Pix2PixHD's is 10."""
    perceptual: float = 0.0
    """Factor of the perceptual distance to the target; Pix2PixHD's is 10, of a distance in VGG19."""
    perceptual_network: PerceptualKind = "st-lpips"
    """Which distance that is."""
    width: int = 64
    """Channels of the discriminator's first layer; 64 as published."""
    layers: int = 3
    """Its convolutions of stride 2; 3 give patches of 70 x 70 pixels."""
    scales: int = 1
    """Discriminators, each of an image half as large; Pix2PixHD's code has 2."""
    affine: bool = True
    """Its norms have parameters; Pix2PixHD's have none."""
    padding: int = 1
    """Of its convolutions; Pix2PixHD's is 2."""

    def __post_init__(self) -> None:
        for name in ("l1", "adversary", "feature_matching", "perceptual", "padding"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; wanted 0 or more")
        for name in ("width", "layers", "scales"):
            if getattr(self, name) < 1:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; wanted at least 1")
        if not (self.l1 or self.adversary or self.feature_matching or self.perceptual):
            raise ValueError("all factors of loss are 0; wanted one of l1, adversary, feature_matching, perceptual above it")

    @property
    def contests(self) -> bool:
        """Whether there is a discriminator at all."""
        return self.adversary > 0 or self.feature_matching > 0

    def make(self) -> MultiScale:
        """A fresh discriminator."""
        made = {"width": self.width, "layers": self.layers, "affine": self.affine, "padding": self.padding}
        return MultiScale(self.scales, lambda: PatchGAN(6, **made))


def verdict(scores: list[Float[Tensor, "B one _ _"]], real: bool, contest: Contest) -> Float[Tensor, "B"]:
    """How far scores, of all scales, are from "real" or from "made", by image: mean over places, sum over scales."""
    distance = F.binary_cross_entropy_with_logits if contest == "cross-entropy" else F.mse_loss
    losses = [distance(s.float(), torch.full_like(s, float(real), dtype=torch.float32), reduction="none") for s in scores]
    return torch.stack([loss.mean((1, 2, 3)) for loss in losses]).sum(0)


def feature_distance(made: list[list[Tensor]], real: list[list[Tensor]]) -> Float[Tensor, "B"]:
    """Pix2PixHD's feature matching (Wang et al. 2018, eq. 4, as its code weighs it): mean absolute difference of each layer but
    the scores, times 4 / layers, mean over scales."""
    by_scale = []
    for ours, theirs in zip(made, real, strict=True):
        layers = [(a.float() - b.float()).abs().mean((1, 2, 3)) for a, b in zip(ours[:-1], theirs[:-1], strict=True)]
        by_scale.append(torch.stack(layers).sum(0) * 4 / len(layers))
    return torch.stack(by_scale).mean(0)


class AdversarialModule(nn.Module):
    """Generator and discriminator with their losses."""

    def __init__(self, generator: Generator, settings: AdversarySettings):
        super().__init__()
        self.generator, self.settings = generator, settings
        self.discriminator = settings.make() if settings.contests else None
        self.perceptual = PerceptualLoss(settings.perceptual_network).requires_grad_(False) if settings.perceptual else None

    def forward(self, batch: Batch) -> Losses:
        source, target = to_float(batch["source"]), to_float(batch["target"])
        output = self.generator.generate(source, batch["noise"])
        losses: Losses = {"l1": (output.float() - target).abs().mean((1, 2, 3))}
        if self.discriminator is not None:
            losses |= self._contest(self.discriminator, source, target, output)
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(output.float(), target)
        return losses

    def _contest(self, discriminator: MultiScale, source: Image, target: Image, output: Image) -> Losses:
        """`adversary` and `feature_matching`, by which the generator learns, and `discriminator`, by which the other one does."""
        kind = self.settings.contest
        made = frozen_call(discriminator, torch.cat((source, output), dim=1))
        both = torch.cat((torch.cat((source, target), dim=1), torch.cat((source, output.detach()), dim=1)))
        judged = discriminator(both)
        real = [[layer.chunk(2)[0] for layer in layers] for layers in judged]
        fake = [layers[-1].chunk(2)[1] for layers in judged]
        losses = {
            "adversary": verdict([layers[-1] for layers in made], True, kind),
            # halved, so that it learns at half the generator's pace: both papers' code
            "discriminator": 0.5 * (verdict([layers[-1] for layers in real], True, kind) + verdict(fake, False, kind)),
        }
        if self.settings.feature_matching:
            losses["feature_matching"] = feature_distance(made, [[layer.detach() for layer in layers] for layers in real])
        return losses


class AdversarialTask:
    """See clipdit.train.task.Task.

    Args:
        pipeline: whose `transformer` is the generator that is trained.
        store: the pixels of the training pairs.
        augment: how each pair is changed anew whenever it is drawn; `views` says nothing here.
    """

    contested = frozenset({"adversary", "discriminator"})

    def __init__(
        self,
        pipeline: ClipDiTPipeline,
        settings: AdversarySettings,
        store: PixelStore,
        held: Held,
        *,
        augment: Augment,
        batch: int,
        seed: int,
    ):
        self.pipeline, self.settings, self.store, self.held = pipeline, settings, store, held
        self.augment, self.batch, self.seed = augment, batch, seed
        generator = pipeline.transformer
        assert isinstance(generator, Generator)
        self.generator = generator
        self.module = AdversarialModule(generator, settings)
        names = ("l1", "adversary", "feature_matching", "perceptual")
        self.weights = {name: getattr(settings, name) for name in names if getattr(settings, name)}
        if settings.contests:
            self.weights["discriminator"] = 1.0

    def draw(self, step: int) -> Batch:
        generator = step_generator(self.seed, step)
        drawn = [self.store[int(i)] for i in batch_indices(len(self.store), self.batch, step, self.seed)]
        changed = [augment(pair[0], pair[1], self.augment, generator) for pair in drawn]
        source, target = (torch.stack(side) for side in zip(*changed, strict=True))
        return {"source": source, "target": target, "noise": torch.randn(source.shape, generator=generator)}

    def save(self, folder: Path) -> None:
        if not (folder / "model_index.json").exists():  # until it is there the folder is no checkpoint
            replace_folder_contents(folder, lambda parts: save_checkpoint(self.pipeline, parts), last="model_index.json")
        save_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors", self.generator.state_dict())

    @torch.no_grad()
    def sheet(self, path: Path) -> None:
        source, target = self.held.pixels.unbind(1)
        device = next(self.generator.parameters()).device
        columns = {"source": source}
        for seed in (0, 1):
            noise = seeded_noise([seed] * len(source), tuple(source.shape[1:]), device)
            columns[f"output, seed {seed}"] = to_u8(self.generator.generate(to_float(source).to(device), noise)).cpu()
        write_image(path, contact_sheet(columns | {"target": target}, blocks=2, tile_px=112))
