"""The checkpoint folder: a diffusers pipeline of DiT, VAE, CLIP image encoder and scheduler, and the call that translates.

    model_index.json   transformer/   vae/   image_encoder/   scheduler/   experiment.json   README.md (the model card)

`model_index.json` also carries what a user of the weights needs: statistics of the latents, size, default steps and guidance.
Only safetensors are ever read. A folder that is damaged or does not fit together is refused in one line. See docs/checkpoint.md.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from jaxtyping import UInt8
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from clipdit.backend import Backend, SamplingDefaults
from clipdit.model.autoencoder import KINDS, VAE, Autoencoder
from clipdit.model.clip import ClipImageEncoder, load_clip_folder
from clipdit.model.dit import DiT
from clipdit.model.generators import GlobalGenerator, UNet
from clipdit.model.network import Network
from clipdit.model.weights import hub_errors, load_diffusers, read_json, refused
from clipdit.objective import Objective, objective_from


class ClipDiTPipeline(DiffusionPipeline):
    """Translates images with a CLIP-conditioned diffusion transformer (arXiv 2505.16001).

    Args:
        transformer, vae, scheduler: the networks and what they were trained to predict. `transformer` is diffusers' name of the
            seat; a generator of pix2pix has it, too.
        image_encoder: CLIP's vision tower; None for a model of conditioning "concat".
        latents_mean, latents_std: of each latent channel of the training targets.
        image_size: (height, width) of training, pixels.
        default_steps, default_guidance: used when a call names none.
        guidable: whether guidance means anything: the network has learnt what it says without a source.
    """

    _optional_components = ["image_encoder"]  # noqa: RUF012  (diffusers reads a list)

    transformer: DiT  # or another Network: what works with a DiT alone must ask
    vae: VAE
    scheduler: SchedulerMixin
    image_encoder: CLIPVisionModelWithProjection | None

    def __init__(
        self,
        transformer: Network,
        vae: VAE,
        scheduler: SchedulerMixin,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        image_size: tuple[int, int] | list[int] = (256, 256),
        default_steps: int = 20,
        default_guidance: float = 1.0,
        guidable: bool = True,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, image_encoder=image_encoder)
        self.register_to_config(
            latents_mean=list(latents_mean) if latents_mean is not None else None,
            latents_std=list(latents_std) if latents_std is not None else None,
            image_size=list(image_size),
            default_steps=default_steps,
            default_guidance=default_guidance,
            guidable=guidable,
        )

    # Made at each call, not kept: a user of diffusers replaces `pipeline.vae` or `pipeline.scheduler`, or moves the pipeline.

    @property
    def autoencoder(self) -> Autoencoder:
        """The VAE with standardised latents, on the VAE's device."""
        return Autoencoder(self.vae, self.config["latents_mean"], self.config["latents_std"])

    @property
    def clip(self) -> ClipImageEncoder | None:
        """The image encoder with its preprocessing, on its device; None without one."""
        return ClipImageEncoder(self.image_encoder) if self.image_encoder is not None else None

    @property
    def objective(self) -> Objective:
        """What the network predicts, and the sampling tables for it."""
        return objective_from(self.scheduler)

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) of training, pixels."""
        height, width = self.config["image_size"]
        return int(height), int(width)

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        return SamplingDefaults(steps=self.config["default_steps"], guidance=self.config["default_guidance"], solver=None)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "ClipDiTPipeline":
        """The pipeline in a folder or at a hub id. Options as in diffusers, but weights are safetensors, whatever is asked for.

        Raises ValueError, one line, for what `load_checkpoint` refuses. Options beyond those of a download, the dtype and
        replaced components (`variant`, `device_map`, quantisation) leave the reading, and its errors, to diffusers."""
        if options.pop("use_safetensors", True) is False:
            raise ValueError("use_safetensors is False; clipdit reads safetensors only")
        name, folder = str(pretrained_model_name_or_path), Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            with hub_errors(name, "checkpoint"):
                folder = Path(cls.download(name, use_safetensors=True, **{k: v for k, v in options.items() if k in DOWNLOAD}))
        dtype = options.get("dtype") or options.get("torch_dtype") or torch.float32
        given = {key: value for key, value in options.items() if key in (*PARTS, "image_encoder", *SETTINGS)}
        plain = DOWNLOAD | {"dtype", "torch_dtype", "low_cpu_mem_usage"} | given.keys()
        if isinstance(dtype, torch.dtype) and options.keys() <= plain:
            return _load(folder, dtype, given)
        _read_index(folder)
        pipeline = super().from_pretrained(str(folder), use_safetensors=True, **options)
        _check_fit(folder, pipeline)
        return pipeline

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

        translator = Translator(cast(Backend, EagerBackend(self)))  # pyright knows no cached_property in a protocol
        chosen = list(seeds) if seeds is not None else list(range(len(source_u8)))
        return translator(source_u8, seeds=chosen, steps=steps, guidance=guidance, solver=solver)


PARTS = ("transformer", "vae", "scheduler")
"""Folders of every checkpoint; `image_encoder` is there unless the conditioning is "concat"."""
SETTINGS = ("latents_mean", "latents_std", "image_size", "default_steps", "default_guidance", "guidable")
"""What `model_index.json` says beside the names of the parts."""
DOWNLOAD = {"cache_dir", "force_download", "proxies", "local_files_only", "token", "revision"}


def load_checkpoint(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> ClipDiTPipeline:
    """The checkpoint in `folder`, on the CPU, for inference, whatever precision it is stored in. ValueError, one line, when it is
    missing, damaged, pickled or does not fit together."""
    return _load(Path(folder), dtype, {})


def _load(folder: Path, dtype: torch.dtype, given: dict[str, Any]) -> ClipDiTPipeline:
    """`given` stands in for parts and settings of the folder."""
    index = _read_index(folder)
    readers = {
        "transformer": lambda where: load_diffusers(NETWORKS[index["transformer"][1]], where, dtype),
        "vae": lambda where: load_diffusers(KINDS[index["vae"][1]], where, dtype),
        "image_encoder": lambda where: load_clip_folder(where, dtype),
        "scheduler": lambda where: _read_scheduler(where, index["scheduler"][1]),
    }
    parts = {name: given[name] if name in given else read(folder / name) for name, read in readers.items() if name in index}
    settings = {name: index[name] for name in SETTINGS if name in index}
    with refused(f"{folder} cannot be loaded as a checkpoint"):
        pipeline = ClipDiTPipeline(**(parts | settings | given))
    _check_fit(folder, pipeline)
    return pipeline


NETWORKS: dict[str, type[Network]] = {kind.__name__: kind for kind in (DiT, UNet, GlobalGenerator)}
"""What may sit in `transformer/`: a generator answers what is asked of a DiT."""
CLASSES = {
    "transformer": {(kind.__module__, name) for name, kind in NETWORKS.items()},
    "vae": {(kind.__module__ if kind.__module__.startswith("clipdit") else "diffusers", name) for name, kind in KINDS.items()},
    "image_encoder": {("transformers", "CLIPVisionModelWithProjection")},
}
"""By part, what `model_index.json` may name: (library, class). Nothing else is imported because a file asks for it."""


def _read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json`, without parts that are not there. ValueError unless it is one of a ClipDiTPipeline."""
    path = folder / "model_index.json"
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give a checkpoint made by `clipdit train`")
    if not path.exists():
        raise ValueError(f"{folder} holds no model_index.json, so it is no checkpoint; give a folder made by `clipdit train`")
    index = read_json(path)
    if index.get("_class_name") != "ClipDiTPipeline":
        kind = index.get("_class_name", "pipeline without a class")
        raise ValueError(f"{folder} is a {kind}; wanted a ClipDiTPipeline made by `clipdit train`")
    if index.get("image_encoder") in (None, [None, None]):
        index.pop("image_encoder", None)
    for part in (*PARTS, "image_encoder") if "image_encoder" in index else PARTS:
        named = index.get(part)
        if not isinstance(named, list) or len(named) != 2 or not all(isinstance(word, str) for word in named):
            raise ValueError(f"{path} is damaged: {part} is {named!r}; wanted its library and class")
        if part in CLASSES and tuple(named) not in CLASSES[part]:
            wanted = " or ".join(sorted(name for _, name in CLASSES[part]))
            raise ValueError(f"{path} names {'.'.join(named)} as {part}; wanted {wanted}")
    _check_settings(index, path)
    return index


def _read_scheduler(folder: Path, name: str) -> SchedulerMixin:
    """The diffusers scheduler of that class. Whether clipdit samples as it does is for `objective_from` to say."""
    path = folder / "scheduler_config.json"
    config = read_json(path)
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"{folder.parent / 'model_index.json'} names {name} as scheduler, which diffusers does not have")
    if config.get("_class_name") != name:
        raise ValueError(f"{path} is of class {config.get('_class_name')}, but model_index.json names {name}")
    with refused(f"{path} is damaged"):
        return kind.from_config(config)  # pyright: ignore[reportAttributeAccessIssue]  (every scheduler is a ConfigMixin)


def load_objective(folder: Path) -> Objective:
    """What the scheduler in a checkpoint's or bundle's `scheduler/` folder describes. ValueError, one line, when it is damaged or
    samples in a way that clipdit does not."""
    return objective_from(_read_scheduler(folder, str(read_json(folder / "scheduler_config.json").get("_class_name"))))


def _check_settings(index: dict[str, Any], path: Path) -> None:
    """That what stands beside the parts is of the right kind; ranges that depend on the parts come later."""

    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def count(value: object) -> bool:
        return type(value) is int and value > 0

    def numbers(value: object) -> bool:
        return value is None or (isinstance(value, list) and all(number(v) for v in value))

    wanted = {
        "latents_mean": (numbers, "a finite number for each latent channel"),
        "latents_std": (numbers, "a finite number for each latent channel"),
        "image_size": (lambda v: isinstance(v, list) and len(v) == 2 and all(map(count, v)), "[height, width] in pixels"),
        "default_steps": (count, "a whole number above 0"),
        "default_guidance": (lambda v: number(v) and v >= 0, "a number, 1 for none"),
        "guidable": (lambda v: isinstance(v, bool), "true or false"),
    }
    for name, (is_right, words) in wanted.items():
        if name in index and not is_right(index[name]):
            raise ValueError(f"{path} is damaged: {name} is {index[name]!r:.80}; wanted {words}")


def _check_fit(folder: Path, pipeline: ClipDiTPipeline) -> None:
    """That the parts belong to one another, and the settings to them."""
    dit, vae, image_encoder = pipeline.transformer, pipeline.vae, pipeline.image_encoder
    problem = None
    channels = int(vae.config["latent_channels"])
    if dit.config["latent_channels"] != channels:
        problem = f"the DiT takes {dit.config['latent_channels']} latent channels, the VAE makes {channels}"
    elif dit.reads_clip and image_encoder is None:
        problem = f"conditioning is {dit.config['conditioning']}, which needs an image_encoder"
    elif dit.reads_clip and image_encoder is not None:
        wanted = (dit.config["clip_token_width"], dit.config["clip_embedding_width"])
        got = (image_encoder.config.hidden_size, image_encoder.config.projection_dim)
        if wanted != got:
            problem = f"the DiT takes CLIP tokens and embeddings of widths {wanted}, the image_encoder makes {got}"
    if problem is not None:
        raise ValueError(f"{folder} does not fit together: {problem}")
    with refused(f"{folder} does not fit together"):  # here, so that it is not found out in the middle of the work
        multiple = pipeline.autoencoder.downscale * dit.config["patch"]
        if any(side % multiple for side in pipeline.native_size):
            raise ValueError(f"image_size is {list(pipeline.native_size)}; wanted multiples of {multiple}")
        pipeline.objective.table(pipeline.sampling_defaults.steps)


def save_checkpoint(pipeline: ClipDiTPipeline, folder: Path) -> None:
    """Write the folder. `model_index.json` comes last and names our classes by module, so that diffusers finds them.

    What `pipeline.save_pretrained` writes, without transformers' progress bar of one step."""
    for name in PARTS:
        getattr(pipeline, name).save_pretrained(folder / name)
    if pipeline.image_encoder is not None:
        config = copy.deepcopy(pipeline.image_encoder.config)
        config.architectures = [type(pipeline.image_encoder).__name__]
        config.save_pretrained(folder / "image_encoder")
        weights = {name: tensor.contiguous() for name, tensor in pipeline.image_encoder.state_dict().items()}
        save_file(weights, folder / "image_encoder" / "model.safetensors", metadata={"format": "pt"})
    pipeline.save_config(folder)
