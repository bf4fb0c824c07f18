"""Trains the DiT on cached latents: the objective's squared error and, if asked, what CLIP and LPIPS think of the decoded image.

The pixel losses (both of the paper) look at the clean image that the prediction implies, decoded on a crop, and only where there
is little noise: elsewhere the estimate is a blur, and no picture that one could judge.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from clipdit.data.cache import LatentCache, condition_of
from clipdit.files import replace_folder_contents
from clipdit.images import to_float, to_u8, write_image
from clipdit.losses import ClipSimilarityLoss, PerceptualKind
from clipdit.model.autoencoder import Autoencoder
from clipdit.model.clip import ClipImageEncoder
from clipdit.model.dit import DiT
from clipdit.objective import Objective, draw_noise
from clipdit.pipeline import ClipDiTPipeline, save_checkpoint
from clipdit.sampling import guide, sample, seeded_noise
from clipdit.sheets import contact_sheet
from clipdit.train.alignment import Alignment
from clipdit.train.order import batch_indices, step_generator
from clipdit.train.state import save_tensors
from clipdit.train.student import Ends
from clipdit.train.task import Batch, Losses


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is added to the objective's own loss, and how much of it."""

    reconstruction: float = 1.0
    """Factor of the squared error of the prediction (velocity or noise)."""
    clip_similarity: float = 0.0
    """Factor of 1 - cosine of the CLIP embeddings of decoded estimate and target; 0 leaves it out."""
    perceptual: float = 0.0
    """Factor of the perceptual distance of decoded estimate and target; 0 leaves it out."""
    perceptual_network: PerceptualKind = "st-lpips"
    """Which distance that is. "lpips" is the paper's; its trunk must be on this machine."""
    alignment: float = 0.0
    """Factor of REPA's loss: a block's tokens, projected, against CLIP's of the target (see alignment.py); 0 leaves it out."""
    gate: float = 0.6
    """Signal level (0 noise, 1 clean) from which the pixel losses count."""
    fraction: float = 0.25
    """Share of a batch that may be decoded for the pixel losses; decoding costs more than the DiT itself on small models."""
    crop: int = 8
    """Side of the crop that is decoded, latent cells; 0 decodes the whole."""

    @property
    def pixels(self) -> bool:
        """Whether anything has to be decoded."""
        return self.clip_similarity > 0 or self.perceptual > 0

    @property
    def wants_clip(self) -> bool:
        """Whether a loss asks CLIP, whatever the model reads."""
        return self.clip_similarity > 0 or self.alignment > 0

    def __post_init__(self) -> None:
        for name in ("reconstruction", "clip_similarity", "perceptual", "alignment", "crop"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; wanted 0 or more")
        for name in ("gate", "fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; wanted a number in [0, 1]")


class TranslationModule(nn.Module):
    """The DiT with its losses. The networks that only judge are frozen.

    Args:
        perceptual: (output, target) in [-1, 1] -> a distance an image; None where loss.perceptual is 0.
        clip: None where loss.clip_similarity is 0.
        clip_token_width: of the target's CLIP tokens in a batch; None where loss.alignment is 0.
    """

    def __init__(
        self,
        dit: DiT,
        objective: Objective,
        loss: LossSettings,
        *,
        autoencoder: Autoencoder,
        clip: ClipImageEncoder | None = None,
        perceptual: nn.Module | None = None,
        clip_token_width: int | None = None,
    ):
        super().__init__()
        self.dit, self.objective, self.loss = dit, objective, loss
        if loss.clip_similarity and clip is None:
            raise ValueError("loss.clip_similarity needs a CLIP image encoder; give --clip, or set it to 0")
        assert perceptual is not None or not loss.perceptual
        self.autoencoder = autoencoder.requires_grad_(False) if loss.pixels else None
        self.perceptual = perceptual.requires_grad_(False) if perceptual is not None and loss.perceptual else None
        self.clip = clip.requires_grad_(False) if clip is not None and loss.clip_similarity else None
        assert clip_token_width is not None or not loss.alignment
        self.alignment = Alignment(dit, clip_token_width) if clip_token_width is not None and loss.alignment else None

    def forward(self, batch: Batch) -> Losses:
        condition = condition_of(batch, self.dit)
        keep = batch["keep"].to(condition.latent.dtype)
        condition = condition.map(lambda x: x * keep.reshape(-1, *[1] * (x.ndim - 1)))
        noised = self.objective.noised(batch["target"], batch["noise"], batch["time"])
        prediction = self.dit(noised.x, noised.t, condition).float()
        losses: Losses = {}
        if self.alignment is not None:  # before anything else runs the DiT again
            patch, (height, width) = self.dit.config["patch"], noised.x.shape[-2:]
            losses["alignment"] = self.alignment((height // patch, width // patch), batch["target_tokens"])
        error = (prediction - noised.prediction_target).square().mean((1, 2, 3))
        losses["reconstruction"] = noised.weight * error
        if self.loss.pixels:
            losses |= self._pixel_losses(batch, noised.x, noised.t, prediction)  # pyright: ignore[reportCallIssue]  (the decorator)
        return losses

    # Outside of what --train.compile compiles: another number of images in every step means minutes of compiling, and PyTorch
    # 2.15 cannot compile the gradient of CLIP's bicubic resizing of a batch whose size changes.
    @torch.compiler.disable
    def _pixel_losses(self, batch: Batch, x: Tensor, t: Tensor, prediction: Tensor) -> Losses:
        """Per image; 0 where the gate is closed. Divided by the share of images looked at, so factors do not depend on it."""
        assert self.autoencoder is not None
        chosen = (batch["look"] & (self.objective.signal_level(t) >= self.loss.gate)).nonzero()[:, 0]
        zeros = prediction.new_zeros(len(prediction))
        names = [n for n, net in (("clip_similarity", self.clip), ("perceptual", self.perceptual)) if net is not None]
        if not len(chosen):
            return {name: zeros + 0.0 * prediction.sum() for name in names}
        estimate = self.objective.estimate_target(x, t, prediction)[chosen]
        target = batch["target"][chosen]
        if self.loss.crop:
            estimate, target = (_crop(z, batch["corner"][chosen], self.loss.crop) for z in (estimate, target))
        # at once: on a CPU the way back through image after image takes several times as long
        output = self.autoencoder.decode(estimate, at_once=True).float()
        with torch.no_grad():
            pixels = self.autoencoder.decode(target, at_once=True).float()
        losses = {}
        if self.clip is not None:
            losses["clip_similarity"] = ClipSimilarityLoss(self.clip)(output, pixels)
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(output, pixels)
        share = max(self.loss.fraction, 1e-6)
        return {name: zeros.index_put((chosen,), value.to(zeros.dtype) / share) for name, value in losses.items()}


def _crop(latent: Tensor, corner: Tensor, side: int) -> Tensor:
    """A square of `side` cells from each latent; `corner` in [0, 1) says where."""
    height, width = latent.shape[-2:]
    h, w = min(side, height), min(side, width)
    tops, lefts = (corner[:, 0] * (height - h + 1)).long().tolist(), (corner[:, 1] * (width - w + 1)).long().tolist()
    return torch.stack([z[:, a : a + h, b : b + w] for z, a, b in zip(latent, tops, lefts, strict=True)])


def _fresh(seed: int, like: Tensor, row: int) -> Tensor:
    """The noise that a stochastic sampler adds after a row, as `Translator` draws it."""
    return seeded_noise([seed] * len(like), tuple(like.shape[1:]), like.device, draw=row + 1)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Held-out pairs for the sample sheet."""

    pixels: UInt8[Tensor, "n 2 3 H W"]
    names: list[str]


class TranslationTask:
    """See clipdit.train.task.Task."""

    contested: frozenset[str] = frozenset()

    def __init__(
        self,
        pipeline: ClipDiTPipeline,
        objective: Objective,
        loss: LossSettings,
        cache: LatentCache,
        held: Held,
        *,
        clip: ClipImageEncoder | None,
        perceptual: nn.Module | None,
        batch: int,
        seed: int,
        drop: float,
        steps: int,
        guidance: float,
        ends: Ends | None = None,
    ):
        """`pipeline` is the checkpoint whose DiT is trained; `objective` its own, with what matters in training only; `ends` are
        a teacher's, which a student learns to reach instead of the targets."""
        self.pipeline, self.dit, self.objective, self.loss = pipeline, pipeline.transformer, objective, loss
        self.autoencoder = Autoencoder(pipeline.vae, cache.statistics.mean, cache.statistics.std).eval()
        self.clip, self.cache, self.held, self.ends = clip.eval() if clip else None, cache, held, ends
        self.batch, self.seed, self.drop, self.steps, self.guidance = batch, seed, drop, steps, guidance
        self.module = TranslationModule(
            self.dit,
            objective,
            loss,
            autoencoder=self.autoencoder,
            clip=self.clip,
            perceptual=perceptual,
            clip_token_width=self.clip.token_width if self.clip is not None and loss.alignment else None,
        )
        factors = {n: getattr(loss, n) for n in ("reconstruction", "clip_similarity", "perceptual", "alignment")}
        self.weights = {name: factor for name, factor in factors.items() if factor}

    def draw(self, step: int) -> Batch:
        generator = step_generator(self.seed, step)
        if self.ends is None:
            pairs = batch_indices(self.cache.pairs, self.batch, step, self.seed)
            views = torch.randint(self.cache.views, (self.batch,), generator=generator).numpy()
            batch = self.cache.rows(pairs * self.cache.views + views)
        else:
            rows, noise, end = self.ends.draw(step, generator)
            batch = self.cache.rows(rows) | {"target": end, "noise": noise}
        if not self.dit.reads_clip:
            batch = {name: part for name, part in batch.items() if name not in ("tokens", "pooled")}
        batch["time"] = self.objective.sample_times(self.batch, generator)
        if self.ends is None:
            batch["noise"] = draw_noise(batch["target"], generator)
        batch["keep"] = torch.rand(self.batch, generator=generator) >= self.drop
        if self.loss.pixels:
            batch["look"] = torch.rand(self.batch, generator=generator) < self.loss.fraction
            batch["corner"] = torch.rand(self.batch, 2, generator=generator)
        return batch

    def save(self, folder: Path) -> None:
        if not (folder / "model_index.json").exists():  # until it is there the folder is no checkpoint
            replace_folder_contents(folder, lambda parts: save_checkpoint(self.pipeline, parts), last="model_index.json")
        save_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors", self.dit.state_dict())

    @torch.no_grad()
    def sheet(self, path: Path) -> None:
        source, target = self.held.pixels.unbind(1)
        device = next(self.dit.parameters()).device
        self.autoencoder.to(device)
        image = to_float(source).to(device)
        features = self.clip.to(device)(image) if self.clip is not None and self.dit.reads_clip else None
        batch = {"source": self.autoencoder.encode(image)}
        if features is not None:
            batch |= {"tokens": features[0], "pooled": features[1]}
        condition = condition_of(batch, self.dit)
        columns = {"source": source}
        for seed in (0, 1):
            noise = seeded_noise([seed] * len(source), tuple(condition.latent.shape[1:]), device)
            fresh = functools.partial(_fresh, seed, noise)
            table = self.objective.table(self.steps)
            latent = sample(guide(self.dit, condition, self.guidance), noise, table, step_noise=fresh)
            columns[f"output, seed {seed}"] = to_u8(self.autoencoder.decode(latent)).cpu()
        columns["target"] = target
        write_image(path, contact_sheet(columns, blocks=2, tile_px=112))
