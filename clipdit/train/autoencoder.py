"""Trains a VAE on images of pairs: a fresh one from nothing, or the decoder of one that is there.

Loss (Esser et al. 2021): L1, a perceptual distance and an adversary. There is no KL term: noise on the latents, relative to their
spread, keeps them from hiding what matters in small differences. What a DiT predicts is never quite a latent; a decoder that saw
clean ones alone makes patches and smears of that. A fresh VAE also pays for neighbouring latents that differ: a DiT learns smooth
ones sooner (docs/results.md).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from clipdit.files import write_atomically
from clipdit.images import to_float, to_u8, write_image
from clipdit.losses import PerceptualKind, PerceptualLoss
from clipdit.model.autoencoder import VAE, Autoencoder, is_of_decoder
from clipdit.model.patch_autoencoder import PatchAutoencoder
from clipdit.shapes import Latent
from clipdit.sheets import contact_sheet
from clipdit.train.crops import draw_crops
from clipdit.train.discriminator import Discriminator, adversarial_losses
from clipdit.train.order import step_generator
from clipdit.train.state import save_tensors
from clipdit.train.task import Batch, Losses

EVERY = 4
"""One crop in so many goes before the perceptual network, which costs more than a small VAE.
Several processes are as one where each has a multiple of this many crops."""

TRANSFORMED = 512
"""Images, at most, from which the linear transform of a fresh VAE is made."""


@dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """What a decoder is taught with."""

    crop: int = 96
    """Side of the training crops, pixels; 0 trains on whole images."""
    source_share: float = 0.0
    """Share of sources among the crops; the others are targets, which the decoder has to make."""
    perceptual: PerceptualKind | None = "st-lpips"
    """Network of the perceptual loss."""
    perceptual_weight: float = 0.5
    """Factor of the perceptual loss beside L1."""
    adversary_weight: float = 0.0
    """Factor of the adversarial loss, from a discriminator of patches that learns beside; 0 has none."""
    latent_noise: float = 0.2
    """Noise added to a latent before it is decoded: up to this share of its channels' standard deviation over images of the same
    side, another share for each image."""
    recolour: float = 0.15
    """Share of the crops with red, green and blue exchanged and turned by quarters: few images, many to learn from."""

    def __post_init__(self) -> None:
        for name in ("crop", "perceptual_weight", "adversary_weight", "latent_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} is {getattr(self, name)}; wanted 0 or more")
        for name in ("source_share", "recolour"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; wanted a share in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings(DecoderSettings):
    """The network and what it is taught with."""

    source_share: float = 0.25
    """Share of sources among the crops, whose latents tell the DiT of the source; the others are targets."""
    latent_noise: float = 0.3
    """Noise added to a latent before it is decoded: up to this share of its channels' standard deviation."""
    roughness_weight: float = 0.03
    """Factor of the mean squared difference of neighbouring latents, as a share of that of unrelated ones."""
    latent_channels: int = 32
    channels: tuple[int, ...] = (64, 64, 128)
    """Width at 1/2, 1/4 ... of the size; the last is that of the latents. Multiples of 4."""
    encoder_layers: tuple[int, ...] = (1, 1, 1)
    """Residual blocks there, in the encoder."""
    decoder_layers: tuple[int, ...] = (1, 2, 4)
    """And in the decoder."""

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** len(self.channels)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.roughness_weight < 0:
            raise ValueError(f"model.roughness_weight is {self.roughness_weight}; wanted 0 or more")
        if self.latent_channels < 1:
            raise ValueError(f"model.latent_channels is {self.latent_channels}; wanted at least 1")
        try:
            with torch.device("meta"):
                self.make()
        except ValueError as error:
            raise ValueError(f"model: {error}") from error

    def make(self) -> PatchAutoencoder:
        """A fresh autoencoder."""
        return PatchAutoencoder(
            latent_channels=self.latent_channels,
            patch=self.downscale,
            channels=self.channels,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
        )


def variance_of_side(latent: Latent, is_source: Bool[Tensor, "B"]) -> Float[Tensor, "B C"]:
    """Of each channel, over the images of the same side. Were it over both sides, an encoder could make noise and roughness small
    for nothing, by moving the sources far from the targets; and it did (docs/results.md)."""
    variance = latent.new_zeros(latent.shape[:2])
    for side in (is_source, ~is_source):  # by a mask: shapes must not depend on the data
        mask = side.to(latent.dtype).reshape(-1, 1, 1, 1)
        count = mask.sum() * latent[0, 0].numel()
        centred = mask * (latent - (mask * latent).sum((0, 2, 3), keepdim=True) / count.clamp(min=1))
        variance = variance + mask.reshape(-1, 1) * centred.square().sum((0, 2, 3)) / (count - 1).clamp(min=1)
    return variance


def roughness(latent: Latent, variance: Float[Tensor, "B C"]) -> Float[Tensor, "B"]:
    """Mean squared difference of neighbouring cells over that of unrelated ones, twice the variance of the channel: 1 for white
    noise, 0 for a constant; 1 - their correlation."""
    steps = latent.diff(dim=-1).square().mean((2, 3)) + latent.diff(dim=-2).square().mean((2, 3))  # (B, C)
    return (steps / (4 * variance).clamp(min=1e-6)).mean(1)  # a channel may be constant


class AutoencoderModule(nn.Module):
    """The VAE with its losses."""

    def __init__(self, vae: VAE, settings: DecoderSettings, *, decoder_only: bool):
        super().__init__()
        self.autoencoder = Autoencoder(vae)
        self.decoder_only = decoder_only
        for name, parameter in vae.named_parameters():
            parameter.requires_grad_(is_of_decoder(name) or not decoder_only)
        self.discriminator = Discriminator() if settings.adversary_weight else None
        self.perceptual = PerceptualLoss(settings.perceptual) if settings.perceptual else None
        if self.perceptual is not None:
            self.perceptual.requires_grad_(False)

    def forward(self, batch: Batch) -> Losses:
        image = to_float(batch["image"]).to(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.decoder_only):
            latent = self.autoencoder.encode(image, at_once=True).float()
        # noise relative to the latents' own deviation: else the encoder would drown it by larger latents
        variance = variance_of_side(latent, batch["is_source"])
        given = latent + (batch["strength"][:, None] * variance.detach().sqrt())[:, :, None, None] * batch["noise"]
        output = self.autoencoder.decode(given, at_once=True).float()
        losses = {"l1": (output - image).abs().mean((1, 2, 3)), "mse": (output - image).square().mean((1, 2, 3))}
        if not self.decoder_only:
            losses["roughness"] = roughness(latent, variance)
        if self.discriminator is not None:
            losses |= adversarial_losses(self.discriminator, output, image)
        if self.perceptual is not None:
            judged = self.perceptual(output[::EVERY], image[::EVERY])
            losses["perceptual"] = judged.new_zeros(len(image))
            losses["perceptual"][::EVERY] = judged * (len(image) / len(judged))  # they speak for all of the batch
        return losses


class AutoencoderTask:
    """See clipdit.train.task.Task. Trains `vae` in place; None makes a fresh one, of which the encoder is trained, too.

    ValueError when the crops do not divide into latent cells."""

    contested = frozenset({"adversary", "discriminator"})

    def __init__(
        self,
        settings: DecoderSettings,
        train: UInt8[Tensor, "n 2 3 H W"],
        val: UInt8[Tensor, "m 2 3 H W"],
        batch: int,
        seed: int,
        vae: VAE | None = None,
    ):
        torch.manual_seed(seed)
        self.settings, self.batch, self.seed = settings, batch, seed
        self.sides, self.examples = train.unbind(1), val[:6].flatten(0, 1)
        self.vae = _fresh(settings, train) if vae is None else vae
        nn.Module.to(self.vae, memory_format=torch.channels_last)
        self.module = AutoencoderModule(self.vae, settings, decoder_only=vae is not None)
        self.weights = {"l1": 1.0, "perceptual": settings.perceptual_weight}
        self.weights |= {"adversary": settings.adversary_weight, "discriminator": 1.0}
        if isinstance(settings, AutoencoderSettings):
            self.weights["roughness"] = settings.roughness_weight
        edges = [min(settings.crop or edge, edge) for edge in train.shape[-2:]]
        cells = self.module.autoencoder.downscale
        if any(edge % cells for edge in edges):
            sizes = f"model.crop is {settings.crop}, pairs.size {train.shape[-1]}"
            raise ValueError(f"{sizes}; wanted multiples of {cells}, the pixels of a latent cell")
        self.latent_shape = (self.module.autoencoder.latent_channels, edges[0] // cells, edges[1] // cells)
        self.at_first = self._reconstructions()

    def draw(self, step: int) -> Batch:
        generator, settings = step_generator(self.seed, step), self.settings
        sources = round(self.batch * settings.source_share)
        crops = [
            draw_crops(side, count, step, self.seed, side=settings.crop, recolour=settings.recolour, generator=generator)
            for side, count in zip(self.sides, (sources, self.batch - sources), strict=True)
            if count
        ]
        mixed = torch.randperm(self.batch, generator=generator)  # so that every process, and the perceptual network, has of both
        return {
            "image": torch.cat(crops)[mixed],
            "is_source": mixed < sources,
            "noise": torch.randn((self.batch, *self.latent_shape), generator=generator),
            "strength": settings.latent_noise * torch.rand(self.batch, generator=generator),
        }

    def save(self, folder: Path) -> None:
        if not (folder / "vae" / "config.json").exists():
            write_atomically(folder / "vae" / "config.json", self.vae.to_json_string(), durable=True)
        save_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors", self.vae.state_dict())

    def sheet(self, path: Path) -> None:
        columns = {"image": self.examples, "VAE at the start": self.at_first, "VAE now": self._reconstructions()}
        write_image(path, contact_sheet(columns, blocks=3))

    @torch.no_grad()
    def _reconstructions(self) -> UInt8[Tensor, "m 3 H W"]:
        """Of the examples, without noise."""
        autoencoder = self.module.autoencoder
        images = to_float(self.examples.to(self.vae.device))
        return to_u8(autoencoder.decode(autoencoder.encode(images)).float()).cpu()


def _fresh(settings: DecoderSettings, train: UInt8[Tensor, "n 2 3 H W"]) -> PatchAutoencoder:
    """A VAE to begin with: the linear transform of the training targets."""
    assert isinstance(settings, AutoencoderSettings), "only these tell of a network"
    vae = settings.make()
    vae.begin_with(to_float(train[:: -(-len(train) // TRANSFORMED), 1]))
    return vae
