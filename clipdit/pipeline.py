"""The checkpoint folder: a diffusers pipeline of DiT, VAE, CLIP image encoder and scheduler, and the call that translates.

    model_index.json   transformer/   vae/   image_encoder/   scheduler/   experiment.json   README.md (the model card)

`model_index.json` also carries what a user of the weights needs: statistics of the latents, size, default steps and guidance.
Only safetensors are ever read. `load_checkpoint` refuses a folder that is damaged or does not fit together, in one line.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from clipdit.backend import SamplingDefaults
from clipdit.model.autoencoder import VAE, Autoencoder
from clipdit.model.clip import ClipImageEncoder
from clipdit.model.dit import DiT
from clipdit.objective import Objective, objective_from


class ClipDiTPipeline(DiffusionPipeline):
    """Translates images with a CLIP-conditioned diffusion transformer (arXiv 2505.16001).

    Args:
        transformer, vae, scheduler: the networks and what they were trained to predict.
        image_encoder: CLIP's vision tower; None for a model of conditioning "concat".
        latents_mean, latents_std: of each latent channel of the training targets.
        image_size: (height, width) of training, pixels.
        default_steps, default_guidance: used when a call names none.
    """

    model_cpu_offload_seq = "image_encoder->transformer->vae"
    _optional_components = ["image_encoder"]  # noqa: RUF012  (diffusers reads a list)

    transformer: DiT
    vae: VAE
    scheduler: SchedulerMixin
    image_encoder: CLIPVisionModelWithProjection | None

    def __init__(
        self,
        transformer: DiT,
        vae: VAE,
        scheduler: SchedulerMixin,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        image_size: Sequence[int] = (256, 256),
        default_steps: int = 20,
        default_guidance: float = 1.0,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, image_encoder=image_encoder)
        self.register_to_config(
            latents_mean=list(latents_mean) if latents_mean is not None else None,
            latents_std=list(latents_std) if latents_std is not None else None,
            image_size=list(image_size),
            default_steps=default_steps,
            default_guidance=default_guidance,
        )

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The VAE with standardised latents."""
        return Autoencoder(self.vae, self.config.latents_mean, self.config.latents_std).to(self.vae.device)

    @cached_property
    def clip(self) -> ClipImageEncoder | None:
        """The image encoder with its preprocessing, None without one."""
        return ClipImageEncoder(self.image_encoder).to(self.image_encoder.device) if self.image_encoder is not None else None

    @cached_property
    def objective(self) -> Objective:
        """What the network predicts, and the sampling tables for it."""
        return objective_from(self.scheduler)

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) of training, pixels."""
        height, width = self.config.image_size
        return int(height), int(width)

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        return SamplingDefaults(steps=self.config.default_steps, guidance=self.config.default_guidance, solver=None)

    @torch.inference_mode()
    def __call__(
        self,
        source_u8: UInt8[Tensor, "B 3 H W"],
        seeds: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        solver: str | None = None,
    ) -> UInt8[Tensor, "B 3 H W"]:
        """Translate uint8 RGB images of equal size on the pipeline's device. `seeds`: one an image, default 0, 1, 2 ...

        `clipdit.translator.Translator` does the same on any backend; this is the short way for users of diffusers."""
        from clipdit.torch_backend import EagerBackend  # here, not above: backends are built on this file
        from clipdit.translator import Translator

        translator = Translator(EagerBackend(self))
        chosen = list(seeds) if seeds is not None else list(range(len(source_u8)))
        return translator(source_u8, seeds=chosen, steps=steps, guidance=guidance, solver=solver)


PARTS = ("transformer", "vae", "scheduler")


def load_checkpoint(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> ClipDiTPipeline:
    """The checkpoint in `folder`, on the CPU. ValueError, one line, when it is missing, damaged, pickled or does not
    fit together."""
    folder = Path(folder)
    index = _index(folder)
    for part in [*PARTS, *(["image_encoder"] if index.get("image_encoder", [None])[0] else [])]:
        _check_part(folder, part)
    try:
        pipeline = ClipDiTPipeline.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        ).to(dtype=dtype)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        AttributeError,
        SafetensorError,
        json.JSONDecodeError,
    ) as error:
        # whatever a damaged configuration makes of a library's loading code; the cause stays attached
        raise ValueError(f"{folder} cannot be loaded as a checkpoint: {_one_line(error)}") from error
    _check_fit(folder, pipeline)
    return pipeline


def _index(folder: Path) -> dict:
    path = folder / "model_index.json"
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give a checkpoint made by `clipdit train`")
    if not path.exists():
        raise ValueError(f"{folder} holds no model_index.json, so it is no checkpoint; give a folder made by `clipdit train`")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        name = index["_class_name"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {_one_line(error)}") from error
    if name not in ("ClipDiTPipeline", ["clipdit.pipeline", "ClipDiTPipeline"]):
        raise ValueError(f"{folder} is a {name}; wanted a ClipDiTPipeline made by `clipdit train`")
    return index


def _check_part(folder: Path, part: str) -> None:
    """That a part is there, is safetensors, and is whole."""
    config = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    if not config.exists():
        raise ValueError(f"{folder} is not whole: {config.relative_to(folder)} is missing")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{config} is damaged: {_one_line(error)}") from error
    if part == "scheduler":
        return
    files = sorted((folder / part).glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in (folder / part).iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        hint = f"; {pickled[0]} is a pickle, which can run code and is never loaded" if pickled else ""
        raise ValueError(f"{folder} is not whole: {part}/ holds no .safetensors file{hint}")
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                weights.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or no safetensors file: {_one_line(error)}") from error


def _check_fit(folder: Path, pipeline: ClipDiTPipeline) -> None:
    """That the parts belong to one another."""
    dit, vae, image_encoder = pipeline.transformer, pipeline.vae, pipeline.image_encoder
    channels = int(vae.config.latent_channels)
    if dit.config.latent_channels != channels:
        raise ValueError(
            f"{folder} does not fit together: the DiT takes {dit.config.latent_channels} channels, the VAE makes {channels}"
        )
    if dit.reads_clip and image_encoder is None:
        raise ValueError(f'{folder} does not fit together: conditioning "{dit.config.conditioning}" needs an image_encoder')
    if dit.reads_clip and image_encoder is not None:
        wanted = (dit.config.clip_token_width, dit.config.clip_embedding_width)
        got = (image_encoder.config.hidden_size, image_encoder.config.projection_dim)
        if wanted != got:
            raise ValueError(
                f"{folder} does not fit together: the transformer takes CLIP of widths {wanted}, the encoder makes {got}"
            )
    for module in (dit, vae, image_encoder):
        for name, tensor in module.state_dict().items() if module is not None else []:
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{folder} is damaged: {type(module).__name__} holds numbers that are not finite, in {name}")
    try:
        pipeline.autoencoder, pipeline.objective  # noqa: B018  (built here, so that what is wrong with them is said here)
    except ValueError as error:
        raise ValueError(f"{folder} does not fit together: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def save_checkpoint(pipeline: ClipDiTPipeline, folder: Path) -> None:
    """Write the folder. `model_index.json` names our classes by module, so diffusers finds them without a custom-code flag."""
    pipeline.save_pretrained(str(folder), safe_serialization=True)
