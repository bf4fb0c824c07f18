"""Trains the small VAE of a checkpoint: both sides of the pairs in, the same out.

Loss (Esser et al. 2021, without the adversary): L1, a perceptual distance, and a faint KL term that keeps latents bounded. Both
sides, because the source's latent is what the DiT is told of the source.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from jaxtyping import UInt8
from torch import Tensor, nn

from clipdit.files import write_atomically
from clipdit.images import to_float, to_u8, write_image
from clipdit.losses import PerceptualKind, PerceptualLoss
from clipdit.sheets import contact_sheet
from clipdit.train.order import batch_indices, step_generator
from clipdit.train.state import save_tensors
from clipdit.train.task import Batch, Losses


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """The network and its losses."""

    latent_channels: int = 16
    channels: tuple[int, ...] = (32, 64, 96, 96)
    """Width at each resolution, from full to lowest; one level fewer halvings. Multiples of 8."""
    layers: int = 1
    """Residual blocks a level in the encoder; the decoder has one more."""
    crop: int = 96
    """Side of the training crops, pixels; 0 trains on whole images."""
    perceptual: PerceptualKind | None = "efficientnet-lite0"
    """Network of the perceptual loss."""
    perceptual_weight: float = 0.1
    """Factor of the perceptual loss beside L1."""
    kl_weight: float = 1e-4
    """Factor of the KL divergence to a unit Gaussian, summed over a latent cell's channels, mean over cells."""
    latent_noise: float = 0.0
    """Noise added to a latent before it is decoded: up to this share of its channels' standard deviation, another share for each
    image. What a DiT predicts is never quite a latent; a decoder that saw clean ones alone makes patches and smears of that."""
    recolour: float = 0.0
    """Share of the crops with red, green and blue exchanged and turned by quarters: few images, many to learn from."""

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.channels) - 1)

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 8 or any(width % 8 for width in self.channels):
            raise ValueError(f"model.channels are {self.channels}; wanted multiples of 8, one for each resolution")
        for name in ("latent_channels", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; wanted at least 1")
        for name in ("crop", "perceptual_weight", "kl_weight", "latent_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} is {getattr(self, name)}; wanted 0 or more")
        if not 0 <= self.recolour <= 1:
            raise ValueError(f"model.recolour is {self.recolour}; wanted a share in [0, 1]")
        if self.crop % self.downscale:
            raise ValueError(f"model.crop is {self.crop}; wanted a multiple of {self.downscale}, the pixels of a latent cell")

    def make(self, size: int) -> AutoencoderKL:
        """A fresh autoencoder for images of about `size` pixels."""
        levels = len(self.channels)
        return AutoencoderKL(  # diffusers types tuples of any length as tuples of one
            down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
            up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
            block_out_channels=self.channels,  # pyright: ignore[reportArgumentType]
            layers_per_block=self.layers,
            latent_channels=self.latent_channels,
            norm_num_groups=8,
            mid_block_add_attention=False,  # one head as wide as the level: no fused kernel takes it
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.0,  # latents are standardised by channel instead, see clipdit.model.autoencoder
            force_upcast=False,
            sample_size=size,
        )


class AutoencoderModule(nn.Module):
    """The VAE with its losses."""

    def __init__(self, vae: AutoencoderKL, settings: AutoencoderSettings):
        super().__init__()
        self.vae = vae
        self.perceptual = PerceptualLoss(settings.perceptual) if settings.perceptual else None
        if self.perceptual is not None:
            self.perceptual.requires_grad_(False)

    def forward(self, batch: Batch) -> Losses:
        image = to_float(batch["image"]).to(memory_format=torch.channels_last)
        moments = self.vae.encoder(image).float()
        mean, log_variance = moments.chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        variance = log_variance.exp()
        if "strength" in batch:  # relative to the latents' own spread: else the encoder would drown the noise by larger latents
            spread = mean.detach().std((0, 2, 3), keepdim=True)
            variance = variance + (batch["strength"].reshape(-1, 1, 1, 1) * spread).square()
        latent = mean + variance.sqrt() * batch["noise"]
        output = self.vae.decoder(latent).float()
        losses = {
            "l1": (output - image).abs().mean((1, 2, 3)),
            "kl": 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean((1, 2)),
            "mse": (output - image).square().mean((1, 2, 3)),
        }
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(output, image)
        return losses


class AutoencoderTask:
    """See clipdit.train.task.Task."""

    def __init__(
        self,
        settings: AutoencoderSettings,
        train: UInt8[Tensor, "n 2 3 H W"],
        val: UInt8[Tensor, "m 2 3 H W"],
        batch: int,
        seed: int,
    ):
        torch.manual_seed(seed)
        self.settings, self.batch, self.seed = settings, batch, seed
        self.images, self.examples = train.flatten(0, 1), val[:6].flatten(0, 1)
        self.vae = settings.make(train.shape[-1])
        nn.Module.to(self.vae, memory_format=torch.channels_last)
        self.module = AutoencoderModule(self.vae, settings)
        self.weights = {"l1": 1.0, "perceptual": settings.perceptual_weight, "kl": settings.kl_weight}

    def draw(self, step: int) -> Batch:
        generator = step_generator(self.seed, step)
        height, width = self.images.shape[-2:]
        side_h, side_w = (min(self.settings.crop or edge, edge) for edge in (height, width))
        crops = []
        for i in batch_indices(len(self.images), self.batch, step, self.seed):
            top, left, flip = (
                int(torch.randint(n, (), generator=generator)) for n in (height - side_h + 1, width - side_w + 1, 2)
            )
            crop = self.images[i, :, top : top + side_h, left : left + side_w]
            crop = crop.flip(-1) if flip else crop
            if self.settings.recolour and torch.rand((), generator=generator) < self.settings.recolour:
                turns = int(torch.randint(4 if side_h == side_w else 1, (), generator=generator))
                crop = crop[torch.randperm(3, generator=generator)].rot90(turns, (-2, -1))
            crops.append(crop)
        cells = self.settings.downscale
        shape = (self.batch, self.settings.latent_channels, side_h // cells, side_w // cells)
        batch = {"image": torch.stack(crops), "noise": torch.randn(shape, generator=generator)}
        if self.settings.latent_noise:
            batch["strength"] = self.settings.latent_noise * torch.rand(self.batch, generator=generator)
        return batch

    def save(self, folder: Path) -> None:
        target = folder / "vae"
        if not (target / "config.json").exists():
            write_atomically(target / "config.json", self.vae.to_json_string(), durable=True)
        save_tensors(target / "diffusion_pytorch_model.safetensors", self.vae.state_dict())

    @torch.no_grad()
    def sheet(self, path: Path) -> None:
        image = to_float(self.examples)
        device = next(self.vae.parameters()).device
        output = self.vae(image.to(device), sample_posterior=False).sample.cpu()
        columns = {"image": self.examples, "through the VAE": to_u8(output)}
        write_image(path, contact_sheet(columns, blocks=4))
