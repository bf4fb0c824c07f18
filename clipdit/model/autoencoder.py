"""The autoencoder between pixels and latents: diffusers' AutoencoderKL or AutoencoderTiny, by folder or hub id, or our Taef2.

`Autoencoder` hides what differs among them (sampling or not, [0, 1] or [-1, 1], scale): latents come out standardised by channel,
about unit variance, with the mean and standard deviation measured on the training targets.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from clipdit.model.taef2 import Taef2
from clipdit.shapes import Image, Latent

VAE = AutoencoderKL | AutoencoderTiny | Taef2


class Autoencoder(nn.Module):
    """Pixels <-> standardised latents.

    Args:
        vae: a diffusers autoencoder.
        mean, std: of each latent channel; None leaves latents as the VAE's own scale factor has them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vae: VAE, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        super().__init__()
        self.vae = vae
        channels = int(vae.config.latent_channels)
        mean, std = mean or [0.0] * channels, std or [1.0] * channels
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise ValueError(
                f"latents have {channels} channels, but {len(mean)} means and {len(std)} deviations above 0 were given"
            )
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    @property
    def latent_channels(self) -> int:
        return int(self.vae.config.latent_channels)

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side."""
        config = self.vae.config
        levels = len(config.get("block_out_channels") or config["encoder_block_out_channels"])
        return 2 ** (levels - 1)

    def encode(self, image: Image) -> Latent:
        """[-1, 1] pixels -> standardised latents; the mean of the distribution, no noise."""
        image = image.to(self.vae.dtype)
        if isinstance(self.vae, AutoencoderKL):
            raw = cast(Tensor, self.vae.encode(image).latent_dist.mode())
            raw = (raw - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor
        else:
            raw = cast(Tensor, self.vae.encode(image).latents) * self.vae.config.scaling_factor
        return (raw - self.mean.to(raw.dtype)) / self.std.to(raw.dtype)

    def decode(self, latent: Latent) -> Image:
        """Standardised latents -> pixels, about [-1, 1]; not clipped."""
        raw = latent.to(self.vae.dtype) * self.std.to(self.vae.dtype) + self.mean.to(self.vae.dtype)
        raw = raw / self.vae.config.scaling_factor
        if isinstance(self.vae, AutoencoderKL):
            raw = raw + (self.vae.config.shift_factor or 0.0)
        return cast(Tensor, self.vae.decode(raw).sample)


KINDS = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny, "Taef2": Taef2}


def load_vae(where: str | Path) -> VAE:
    """A VAE from a folder (its own, one with a `vae/` inside, or TAEF2's two .pth files) or from a hub id.

    ValueError, one line, when there is none or it is of a kind we do not know."""
    folder = Path(where)
    if not folder.is_dir():
        return _from_hub(str(where))
    if (folder / "taef2_encoder.pth").exists():
        return Taef2.from_state_dicts(folder / "taef2_encoder.pth", folder / "taef2_decoder.pth")
    if (folder / "vae" / "config.json").exists():
        folder = folder / "vae"
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} holds no config.json, so it is no VAE; give a diffusers VAE folder, a checkpoint folder or a hub id"
        )
    return _load(str(folder), AutoencoderKL.load_config(folder, local_files_only=True))


def _from_hub(name: str) -> VAE:
    """A repository that is a VAE (sd-vae-ft-mse, taesd), or a pipeline with one."""
    try:
        config = AutoencoderKL.load_config(name)
        subfolder = None
    except OSError:
        try:
            config, subfolder = AutoencoderKL.load_config(name, subfolder="vae"), "vae"
        except OSError as error:
            raise ValueError(
                f"no VAE at {name}: neither a folder here nor a repository that can be reached ({_first_line(error)})"
            ) from error
    return _load(name, config, subfolder)


def _load(name: str, config: dict, subfolder: str | None = None) -> VAE:
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise ValueError(f"{name} is of class {kind}; wanted one of {', '.join(KINDS)}")
    extra = {"subfolder": subfolder} if subfolder else {}
    return KINDS[kind].from_pretrained(name, use_safetensors=True, **extra)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
