"""The autoencoder between pixels and latents: diffusers' AutoencoderKL or AutoencoderTiny, by folder or hub id, Taef2, or
none (Pixels).

`Autoencoder` hides what differs among them (sampling or not, [0, 1] or [-1, 1], scale): latents come out standardised by channel,
about unit variance, with the mean and standard deviation measured on the training targets.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from torch import Tensor, nn

from clipdit.model.pixels import Pixels
from clipdit.model.taef2 import Taef2
from clipdit.model.weights import hub_errors, load_diffusers, read_json
from clipdit.shapes import Image, Latent

VAE = AutoencoderKL | AutoencoderTiny | Taef2 | Pixels


class Autoencoder(nn.Module):
    """Pixels <-> standardised latents.

    Args:
        vae: a diffusers autoencoder.
        mean, std: of each latent channel; None leaves latents as the VAE's own scale factor has them.

    It lives on the device of `vae`. ValueError when mean and std are not one finite number for each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vae: VAE, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        super().__init__()
        self.vae = vae
        channels = int(vae.config["latent_channels"])
        mean = [0.0] * channels if mean is None else mean
        std = [1.0] * channels if std is None else std
        if len(mean) != channels or len(std) != channels:
            raise ValueError(f"latents have {channels} channels, but {len(mean)} means and {len(std)} deviations were given")
        if not all(math.isfinite(m) and 0 < s < math.inf for m, s in zip(mean, std, strict=True)):
            raise ValueError("means of latents must be finite numbers, and their deviations finite and above 0")
        for name, values in (("mean", mean), ("std", std)):
            values = torch.tensor(values, dtype=torch.float32, device=vae.device).reshape(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @property
    def latent_channels(self) -> int:
        return int(self.vae.config["latent_channels"])

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side."""
        config = self.vae.config
        levels = len(config.get("block_out_channels") or config["encoder_block_out_channels"])
        return 2 ** (levels - 1)

    def encode(self, image: Image, *, at_once: bool = False) -> Latent:
        """[-1, 1] pixels -> standardised latents; the mean of the distribution, no noise.

        `at_once`: on a CPU, too, the batch as a whole, as training wants it."""
        return self._encode(_laid_out(image)) if at_once else _in_parts(self._encode, image)

    def decode(self, latent: Latent, *, at_once: bool = False) -> Image:
        """Standardised latents -> pixels, about [-1, 1]; not clipped. `at_once` as in `encode`."""
        return self._decode(_laid_out(latent)) if at_once else _in_parts(self._decode, latent)

    def _encode(self, image: Image) -> Latent:
        image = image.to(self.vae.dtype)
        if isinstance(self.vae, AutoencoderKL):
            raw = cast(Any, self.vae.encode(image)).latent_dist.mode()
            raw = (raw - (self.vae.config["shift_factor"] or 0.0)) * self.vae.config["scaling_factor"]
        else:
            raw = cast(Any, self.vae.encode(image)).latents * self.vae.config["scaling_factor"]
        return (raw - self.mean.to(raw.dtype)) / self.std.to(raw.dtype)

    def _decode(self, latent: Latent) -> Image:
        raw = latent.to(self.vae.dtype) * self.std.to(self.vae.dtype) + self.mean.to(self.vae.dtype)
        raw = raw / self.vae.config["scaling_factor"]
        if isinstance(self.vae, AutoencoderKL):
            raw = raw + (self.vae.config["shift_factor"] or 0.0)
        return cast(Any, self.vae.decode(raw)).sample


def _in_parts(function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """`function` of a batch; on a CPU of one image after another, channels last, unless it is traced.

    A batch's activations at full resolution do not fit into a CPU's cache: thirty-two images together took 1.4 (128 px) to 2.4
    times (256 px) as long as one by one, on one thread; channels last saves a quarter of the rest (docs/speed.md). Nor can an
    image then depend on its batch.
    """
    if batch.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return function(batch)
    parts = [function(_laid_out(image)) for image in batch.split(1)]
    return torch.cat(parts).contiguous() if parts else function(batch)


def _laid_out(batch: Tensor) -> Tensor:
    """As convolutions on its device like it best."""
    return batch.contiguous(memory_format=torch.channels_last) if batch.device.type == "cpu" else batch


@torch.no_grad()
def latent_correlation(one: Autoencoder, other: Autoencoder, image: Image) -> float:
    """How far two autoencoders mean the same by a latent: Pearson's r of each channel over the cells of all images, mean over the
    channels. 0 where they do not have the same shape of latents; [-1, 1]."""
    if (one.latent_channels, one.downscale) != (other.latent_channels, other.downscale):
        return 0.0
    x, y = (latent - latent.mean((0, 2, 3), keepdim=True) for latent in (one.encode(image).float(), other.encode(image).float()))
    products, squares = (x * y).mean((0, 2, 3)), x.square().mean((0, 2, 3)) * y.square().mean((0, 2, 3))
    return float((products / squares.sqrt().clamp(min=torch.finfo(torch.float32).tiny)).mean())


def is_of_decoder(name: str) -> bool:
    """Whether a parameter of a VAE, by name, acts in decoding. The others make the latents."""
    return name.startswith(("decoder.", "post_quant_conv."))


KINDS: dict[str, type[VAE]] = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny, Taef2, Pixels)}


def load_vae(where: str | Path) -> VAE:
    """A VAE from a folder (its own, one with a `vae/` inside, or TAEF2's two .pth files) or from a hub id, in float32.

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
    return load_diffusers(_kind(read_json(folder / "config.json"), folder), folder)


def _kind(config: dict, where: object) -> type[VAE]:
    name = config.get("_class_name")
    if name not in KINDS:
        raise ValueError(f"{where} is of class {name}; wanted a VAE of class {', '.join(KINDS)}")
    return KINDS[name]


def _from_hub(name: str) -> VAE:
    """A repository that is a VAE (sd-vae-ft-mse, taesd), or a pipeline with one."""
    config, subfolder = None, None
    with hub_errors(name, "VAE"):
        try:
            config = hf_hub_download(name, "config.json")  # JSON only, and the user named it  # nosec B615
        except RemoteEntryNotFoundError:  # a pipeline has none at its root
            config, subfolder = hf_hub_download(name, "config.json", subfolder="vae"), "vae"  # nosec B615
    kind = _kind(read_json(Path(config)), name)
    with hub_errors(name, "VAE"):
        return kind.from_pretrained(name, subfolder=subfolder, use_safetensors=True)
