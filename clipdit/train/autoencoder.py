"""Trains a VAE on images of pairs: a fresh one from nothing, or the decoder of one that is there.

Loss (Esser et al. 2021): L1, a perceptual distance, an adversary if asked for and, for a fresh VAE, a faint KL term. What a DiT
predicts is never quite a latent, and a decoder that saw clean ones alone makes patches and smears of that: it sees noised ones.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderKL
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from clipdit.files import write_atomically
from clipdit.images import to_float, to_u8, write_image
from clipdit.losses import PerceptualKind, PerceptualLoss
from clipdit.model.autoencoder import VAE, Autoencoder, is_of_decoder
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

BUILT_BY = (
    "latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups", "mid_block_add_attention", "use_quant_conv",
    "use_post_quant_conv",
)  # fmt: skip
"""The settings of an AutoencoderKL that decide of its layers."""


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
    kl_weight: float = 1e-4
    """Factor of the KL divergence to a unit Gaussian, summed over a latent cell's channels, mean over cells."""
    latent_channels: int = 16
    channels: tuple[int, ...] = (32, 64, 96, 96)
    """Width at each resolution, from full to lowest; one level fewer halvings. Multiples of 8."""
    layers: int = 1
    """Residual blocks a level in the encoder; the decoder has one more."""

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.channels) - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.channels or min(self.channels) < 8 or any(width % 8 for width in self.channels):
            raise ValueError(f"model.channels are {self.channels}; wanted multiples of 8, one for each resolution")
        for name in ("latent_channels", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; wanted at least 1")
        if self.kl_weight < 0:
            raise ValueError(f"model.kl_weight is {self.kl_weight}; wanted 0 or more")

    def make(self) -> AutoencoderKL:
        """A fresh autoencoder."""
        levels = len(self.channels)
        return AutoencoderKL(  # diffusers types tuples of any length as tuples of one
            down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]  (diffusers annotates tuples of one)
            up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]  (diffusers annotates tuples of one)
            block_out_channels=self.channels,  # pyright: ignore[reportArgumentType]  (diffusers annotates tuples of one)
            layers_per_block=self.layers,
            latent_channels=self.latent_channels,
            norm_num_groups=8,
            mid_block_add_attention=False,  # one head as wide as the level: no fused kernel takes it
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.0,  # latents are standardised by channel instead, see clipdit.model.autoencoder
            force_upcast=False,
        )

    def check(self, vae: VAE) -> None:
        """ValueError unless `vae` is built as these settings tell."""
        if not isinstance(vae, AutoencoderKL):
            raise ValueError(
                f"the VAE of --init is an {type(vae).__name__}; wanted an AutoencoderKL, of which all can be trained"
            )
        wanted, config = self.make().config, vae.config
        for name in BUILT_BY:
            theirs, ours = (tuple(v) if isinstance(v, list | tuple) else v for v in (config[name], wanted[name]))
            if theirs != ours:
                raise ValueError(f"the VAE of --init has {name} {theirs}, this run {ours}; they must be the same")


def variance_of_side(latent: Latent, is_source: Bool[Tensor, "B"]) -> Float[Tensor, "B C"]:
    """Of each channel, over the images of the same side. Were it over both, an encoder could make noise that is relative to it
    small for nothing, by moving the sources far from the targets."""
    variance = latent.new_zeros(latent.shape[:2])
    for side in (is_source, ~is_source):  # by a mask: shapes must not depend on the data
        mask = side.to(latent.dtype).reshape(-1, 1, 1, 1)
        count = mask.sum() * latent[0, 0].numel()
        centred = mask * (latent - (mask * latent).sum((0, 2, 3), keepdim=True) / count.clamp(min=1))
        variance = variance + mask.reshape(-1, 1) * centred.square().sum((0, 2, 3)) / (count - 1).clamp(min=1)
    return variance


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
        losses: Losses = {}
        if self.decoder_only:
            with torch.no_grad():
                latent = self.autoencoder.encode(image, at_once=True).float()
            variance = torch.zeros_like(latent)
        else:
            latent, log_variance = cast(Tensor, self.autoencoder.vae.encoder(image)).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-20, 10)
            variance = log_variance.exp()
            losses["kl"] = 0.5 * (latent.square() + variance - 1 - log_variance).sum(1).mean((1, 2))
        # relative to the latents' own deviation: else the encoder would drown the noise by larger latents
        added = batch["strength"][:, None].square() * variance_of_side(latent.detach(), batch["is_source"])
        given = latent + (variance + added[:, :, None, None]).sqrt() * batch["noise"]
        output = self.autoencoder.decode(given, at_once=True).float()
        losses |= {"l1": (output - image).abs().mean((1, 2, 3)), "mse": (output - image).square().mean((1, 2, 3))}
        if self.discriminator is not None:
            losses |= adversarial_losses(self.discriminator, output, image)
        if self.perceptual is not None:
            judged = self.perceptual(output[::EVERY], image[::EVERY])
            losses["perceptual"] = judged.new_zeros(len(image))
            losses["perceptual"][::EVERY] = judged * (len(image) / len(judged))  # they speak for all of the batch
        return losses


class AutoencoderTask:
    """See clipdit.train.task.Task. Trains `vae` in place, its decoder alone by DecoderSettings, all of it by AutoencoderSettings;
    None makes a fresh one, which only the latter can tell of.

    ValueError when the crops do not divide into latent cells, or `vae` is not what AutoencoderSettings tell of."""

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
        decoder_only = not isinstance(settings, AutoencoderSettings)
        if vae is None:
            assert isinstance(settings, AutoencoderSettings), "only these tell of a network"
            vae = settings.make()
        elif isinstance(settings, AutoencoderSettings):
            settings.check(vae)
        self.vae = vae
        nn.Module.to(self.vae, memory_format=torch.channels_last)
        self.module = AutoencoderModule(self.vae, settings, decoder_only=decoder_only)
        self.weights = {"l1": 1.0, "perceptual": settings.perceptual_weight}
        self.weights |= {"adversary": settings.adversary_weight, "discriminator": 1.0}
        if isinstance(settings, AutoencoderSettings):
            self.weights["kl"] = settings.kl_weight
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
