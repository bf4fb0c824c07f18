"""The backends that run a checkpoint folder with PyTorch: eager, the reference that all others are compared with, and compiled.

What depends on the source alone (keys, values, the projected source latent) is computed at the first `velocity` of a condition
and kept for as long as the caller keeps that condition; `sample` computes the modulation of all steps before the first, and
positions once. So a step of the loop runs the blocks and nothing else.
"""

import copy
import hashlib
import inspect
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipdit.backend import Condition, Limits
from clipdit.images import to_float, to_u8
from clipdit.model.network import Context, Modulation, Network
from clipdit.pipeline import PARTS, ClipDiTPipeline, load_checkpoint
from clipdit.sampling import SamplingTable, guide, sample
from clipdit.shapes import ImageU8, Latent, Time

Step = Callable[[Tensor, Modulation, Context, tuple[Tensor, ...]], Tensor]
"""(x, modulation, context, positions) -> prediction: what runs at every step; `DiT.forward_prepared`."""
MODULATION_AT_ONCE = 2**24
"""Numbers of modulation that are computed ahead at once: 64 MiB in float32."""

ENOUGH_KINDS: dict[str, Any] = {"recompile_limit": 64} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
"""Blocks with and without cross-attention and the last one, each for one image, two and any number: that is nine, and PyTorch
runs what comes after eight without compiling it. (PyTorch of before this option keeps its eight.)"""

SomeNetwork = TypeVar("SomeNetwork", bound=Network)

VARIANTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What a checkpoint can be opened in by name, as `--backend eager:bf16`."""


def attention_order(device: torch.device) -> list[SDPBackend]:
    """Which of PyTorch's attentions to try first; empty is PyTorch's own order. From Hopper on that takes FlashAttention 2,
    which took 1.2 to 1.7 times as long as cuDNN's on an H200 (docs/kernels.md)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return []
    return [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def preferring(order: list[SDPBackend], step: Step) -> Step:
    """`step` with the first of these attentions that takes the tensors. Around what is compiled: it chooses when it is traced."""
    if not order:
        return step

    def ordered(x: Tensor, modulation: Modulation, context: Context, positions: tuple[Tensor, ...]) -> Tensor:
        with sdpa_kernel(order, set_priority=True):
            return step(x, modulation, context, positions)

    return ordered


class EagerBackend:
    """A pipeline as it is, on the device and in the dtype it has. `open` brings one from a folder. Its weights may change
    (training), but not while a condition is in use.

    Args:
        pipeline: with all parts on one device; it is used, not copied, and not changed.
        folder: where it was loaded from, if it is unchanged since; gives the fingerprint.
    """

    name = "eager"
    preference = 10
    attention_order = staticmethod(attention_order)

    def __init__(self, pipeline: ClipDiTPipeline, *, folder: Path | None = None):
        dit, autoencoder = pipeline.transformer, pipeline.autoencoder
        self.limits = Limits(
            device=dit.device,
            dtype=dit.dtype,
            max_batch=None,
            sizes=None,
            multiple=autoencoder.downscale * dit.config["patch"],
            native_size=pipeline.native_size,
            latent_channels=autoencoder.latent_channels,
            downscale=autoencoder.downscale,
            guidable=pipeline.config["guidable"],
        )
        self.defaults = pipeline.sampling_defaults
        self._folder = folder
        self._fingerprint: str | None = None
        self._open_pipeline: ClipDiTPipeline | None = pipeline
        self._contexts: WeakKeyDictionary[Condition, Context] = WeakKeyDictionary()
        self._positions: dict[tuple[int, int], tuple[Tensor, ...]] = {}  # by the latent's height and width
        self._step: Step | None = preferring(self.attention_order(self.limits.device), self._build_step(dit))

    @classmethod
    def why_not(cls, folder: Path) -> str | None:
        """Whether this is a checkpoint folder; its files are looked at when it is opened."""
        if not folder.is_dir():
            return f"there is no folder {folder}; wanted a checkpoint made by `clipdit train`"
        if not (folder / "model_index.json").exists():
            return f"{folder} holds no model_index.json, so it is no checkpoint; wanted a folder made by `clipdit train`"
        return None

    @classmethod
    def variants(cls, folder: Path) -> list[str]:
        """The types that it can compute in, which are as good as each other for choosing: `open` has its own default."""
        return list(VARIANTS)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
    ) -> "EagerBackend":
        """Load a checkpoint folder. device None is CUDA where there is one, else the CPU; dtype None is that of `variant`, else
        bfloat16 on a GPU that computes in it, else float32. ValueError for a folder that is damaged, or a device that is not
        there."""
        if variant is not None and variant not in VARIANTS:
            raise ValueError(f"the {cls.name} backend has no variant {variant}; there are {', '.join(VARIANTS)}")
        dtype = VARIANTS[variant] if dtype is None and variant is not None else dtype
        device = best_device() if device is None else device
        _check_device(device)
        dtype = best_dtype(device) if dtype is None else dtype
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; wanted float32, bfloat16 or float16")
        pipeline = load_checkpoint(folder, dtype=dtype)
        # with what wraps them: the statistics of latents and pixels, which stay float32
        modules: list[nn.Module | None] = [pipeline.transformer, pipeline.autoencoder, pipeline.clip]
        for module in modules:
            if module is not None:
                module.to(device)
        return cls(pipeline, folder=folder)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the folder's parts; a pipeline that is in no folder has one of its own."""
        if self._fingerprint is None:  # read when asked for: gigabytes take seconds
            self._fingerprint = checkpoint_fingerprint(self._folder) if self._folder is not None else f"unsaved-{uuid4().hex}"
        return self._fingerprint

    def encode(self, source_u8: ImageU8) -> Condition:
        pipeline = self._pipeline
        self.limits.check_images(tuple(source_u8.shape))
        image = to_float(source_u8.to(self.limits.device))
        latent = pipeline.autoencoder.encode(image).float()
        if pipeline.clip is None:
            dit = pipeline.transformer
            tokens = latent.new_zeros(len(latent), 0, dit.config["clip_token_width"])
            pooled = latent.new_zeros(len(latent), dit.config["clip_embedding_width"])
        else:
            tokens, pooled = pipeline.clip(image)
        return Condition(tokens=tokens.float(), pooled=pooled.float(), latent=latent)

    def velocity(self, x: Latent, t: Time, condition: Condition) -> Latent:
        self._check(x, t, condition)
        context = self._context(condition)
        return self._advance(x, self._pipeline.transformer.modulation(t, context), context)

    def sample(self, noise: Latent, condition: Condition, table: SamplingTable, *, guidance: float = 1.0) -> Latent:
        """See `clipdit.backend.WholeLoop`: the modulation of many rows comes from one call."""
        times = table.tensor(self.limits.device)[:, 0]
        rows: dict[int, Iterator[Modulation]] = {}  # of each condition that guidance asks for

        def velocity(x: Latent, t: Time, of: Condition) -> Latent:
            self._check(x, t, of)
            context = self._context(of)
            return self._advance(x, next(rows.setdefault(id(of), self._modulations(times, len(x), context))), context)

        return sample(guide(velocity, condition, guidance, max_batch=self.limits.max_batch), noise, table)

    def _modulations(self, times: Float[Tensor, "K"], batch: int, context: Context) -> Iterator[Modulation]:
        """Of `batch` images at each time, computed for as many times at once as memory allows."""
        dit = self._pipeline.transformer
        at_once = max(1, MODULATION_AT_ONCE // (batch * dit.modulation_table.numel()))
        for some in times.split(at_once):
            t = some[:, None].expand(-1, batch).reshape(-1)
            pooled = None if context.pooled is None else context.pooled.repeat(len(some), 1)
            made = dit.modulation(t, Context(source_tokens=None, pooled=pooled))
            for blocks, final in zip(made.blocks.split(batch), made.final.split(batch), strict=True):
                yield Modulation(blocks=blocks, final=final)

    @staticmethod
    def _check(x: Latent, t: Time, condition: Condition) -> None:
        if x.shape != condition.latent.shape or t.shape != x.shape[:1]:
            raise ValueError(f"x is {tuple(x.shape)}, t is {tuple(t.shape)}; the condition is of {tuple(condition.latent.shape)}")

    def _context(self, condition: Condition) -> Context:
        dit, context = self._pipeline.transformer, self._contexts.get(condition)
        if context is None:
            context = self._contexts[condition] = dit.context(condition.map(lambda tensor: tensor.to(dit.dtype)))
        return context

    def _advance(self, x: Latent, modulation: Modulation, context: Context) -> Latent:
        assert self._step is not None
        positions = self._positions_of(x.shape[-2], x.shape[-1], x.device)
        return self._step(x.to(self._pipeline.transformer.dtype), modulation, context, positions).to(x.dtype)

    def _positions_of(self, height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
        """`DiT.positions`, once for each size of latents, cells."""
        if (height, width) not in self._positions:
            self._positions[height, width] = self._pipeline.transformer.positions(height, width, device)
        return self._positions[height, width]

    def decode(self, latent: Latent) -> ImageU8:
        image = self._pipeline.autoencoder.decode(latent)
        if not image.isfinite().all():  # NaN would come out as a black image
            raise ValueError(f"the networks made numbers that are not finite in {self.limits.dtype}; open the model with float32")
        return to_u8(image)

    def table(self, steps: int, solver: str | None = None) -> SamplingTable:
        return self._pipeline.objective.table(steps, solver)

    def close(self) -> None:
        self._open_pipeline = None
        self._contexts.clear()
        self._positions.clear()
        self._step = None
        if self.limits.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _pipeline(self) -> ClipDiTPipeline:
        if self._open_pipeline is None:
            raise RuntimeError(f"the {self.name} backend is closed; open it again")
        return self._open_pipeline

    def _build_step(self, dit: Network) -> Step:
        return dit.forward_prepared


class CompiledBackend(EagerBackend):
    """Eager with the blocks of the network through torch.compile: slow at the first call of a shape, faster after it.

    One block is compiled for all that are alike, which takes a third of the time that the whole step does; it computes the same,
    and as fast (docs/kernels.md)."""

    name = "compiled"
    preference = 0

    @classmethod
    def why_not(cls, folder: Path) -> str | None:
        if best_device().type == "cuda":
            missing = None if find_spec("triton") else "the Python package triton is not installed. Run `pip install triton`"
        else:
            missing = None if shutil.which("g++") or shutil.which("clang++") else "there is no C++ compiler. Install g++"
        if missing is None and not Path(sysconfig.get_path("include"), "Python.h").exists():
            missing = "Python's C headers are not installed. Install python3-dev"
        return f"torch.compile cannot build kernels here: {missing}" if missing else super().why_not(folder)

    def _build_step(self, dit: Network) -> Step:
        if not dit.blocks:
            return torch.compile(super()._build_step(dit), dynamic=None)
        twin = with_blocks_of_its_own(dit)
        for block in twin.blocks:
            # the second batch size compiles once more, for any size; the third does not
            block.compile(dynamic=None, **ENOUGH_KINDS)
        return super()._build_step(twin)


def with_blocks_of_its_own(dit: SomeNetwork) -> SomeNetwork:
    """The same network, parameters shared, whose blocks can be compiled while those of `dit` stay as they are."""
    twin = copy.copy(dit)
    twin._modules = dit._modules | {"blocks": nn.ModuleList(copy.copy(block) for block in dit.blocks)}
    return twin


def best_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that computes in it (from Ampere on), else float32."""
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if capable else torch.float32


def checkpoint_fingerprint(folder: Path) -> str:
    """SHA-256 over the configurations and weights in a checkpoint folder; not over its card and its training record."""
    digest = hashlib.sha256()
    parts = [path for part in (*PARTS, "image_encoder") for path in sorted((folder / part).glob("*"))]
    for path in [folder / "model_index.json", *parts]:
        if path.suffix in (".json", ".safetensors"):
            with path.open("rb") as stream:
                digest.update(f"{path.relative_to(folder)} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _check_device(device: torch.device) -> None:
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device}, but PyTorch sees {torch.cuda.device_count()} CUDA devices here; use --device cpu")
