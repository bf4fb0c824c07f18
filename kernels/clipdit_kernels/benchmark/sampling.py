"""Measures whole sampling loops, pixels left out, against PyTorch's ways to run the same network: `clipdit bench sampling`.

Networks of published sizes with random weights: times do not ask what the weights are. All ways take turns on the same noise and
the same condition; what each loses is measured against the loop in float32. What that costs in pictures, only trained weights
tell: `clipdit bench`.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from clipdit.backend import Condition
from clipdit.flow import FlowMatching
from clipdit.graphed_backend import GraphedBackend
from clipdit.measuring import Spread, time_calls_ms
from clipdit.model.dit import SIZES, Conditioning, DiT
from clipdit.pipeline import ClipDiTPipeline
from clipdit.sampling import SamplingTable, flow_table, seeded_noise
from clipdit.torch_backend import EagerBackend, Step, with_blocks_of_its_own
from clipdit_kernels.backend import TritonBackend
from clipdit_kernels.benchmark import ceilings, ledger
from clipdit_kernels.benchmark.cases import CLIP_TOKENS, Shape
from clipdit_kernels.quantized import FUSED_FP8, FUSED_INT8

logger = logging.getLogger(__name__)

CHANNELS, CLIP_WIDTH = 4, 1024
"""Of Stable Diffusion's latents, and of CLIP ViT-L/14's tokens."""


class DefaultAttention(EagerBackend):
    """Eager with the attention that PyTorch takes of itself."""

    attention_order = staticmethod(lambda device: [])


class Compiled(GraphedBackend):
    """torch.compile with max-autotune, each shape by itself, and the loop as one CUDA graph: what is compared is kernels, not
    launches. Products are cuBLAS's, and the settings of kernels are not tuned one after the other, which together take minutes
    for a shape. A block is compiled, and all blocks are that one; as a block ends with the norm of the next, nothing is left to
    be fused across them."""

    how: ClassVar[dict[str, Any]] = {"options": {"max_autotune": True, "max_autotune_gemm_backends": "ATEN"}}

    def _build_token_step(self, dit: DiT) -> Step:
        twin = with_blocks_of_its_own(dit)
        for block in cast(Iterable[nn.Module], twin.blocks):
            block.compile(dynamic=False, **self.how)
        return super()._build_token_step(twin)


class CompiledTuned(Compiled):
    """The mode "max-autotune" itself, in our graph instead of its own: it chooses between cuBLAS's products and its own, and
    tunes the settings of each kernel one after the other."""

    how: ClassVar[dict[str, Any]] = {"mode": "max-autotune-no-cudagraphs"}


VARIANTS: dict[str, Callable[[ClipDiTPipeline], EagerBackend]] = {
    "eager": DefaultAttention,
    "eager-cudnn": EagerBackend,
    "eager-cudnn-graph": GraphedBackend,
    "compile-graph": Compiled,
    "compile-tuned-graph": CompiledTuned,
    "ours": TritonBackend,
    "ours-int8": partial(TritonBackend, low=FUSED_INT8),
    "ours-fp8": partial(TritonBackend, low=FUSED_FP8),
}
USUAL = tuple(name for name in VARIANTS if name != "compile-tuned-graph")
"""The first is what times are given in multiples of. From Hopper on "cudnn" is cuDNN's attention where it takes the tensors; on
other GPUs PyTorch's own choice."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A way to run the loop."""

    ms_per_step: Spread
    error: float
    """Of the final latents from those of float32: norm of the difference over the norm."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What was measured of a network and a batch."""

    size: str
    tokens: int
    images: int
    dtype: str
    floor_ms_per_step: float
    """Of products in this type, or of reading the weights, whichever takes longer."""
    variants: dict[str, Timed]
    left_out: dict[str, str]


def network(shape: Shape, conditioning: Conditioning, device: torch.device) -> DiT:
    """A DiT of a published size with random weights in float32, none of them zero."""
    width, depth, heads = SIZES[shape.size]
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        dit = DiT(
            latent_channels=CHANNELS, width=width, depth=depth, heads=heads, conditioning=conditioning,
            clip_token_width=CLIP_WIDTH, clip_embedding_width=768,
        )  # fmt: skip
        for parameter in dit.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return cast(DiT, nn.Module.to(dit, device)).eval()


def flops_of_step(dit: DiT, shape: Shape) -> int:
    """Of the products that depend on tokens; two for a multiplication and an addition."""
    width, rows = shape.width, shape.rows
    blocks = dit.config["depth"]
    products = 2 * rows * width * width * (4 + 2 * dit.config["mlp_ratio"]) + 4 * rows * shape.tokens * width
    every = dit.config["cross_attention_every"] if dit.reads_clip else 0
    crossing = -(-blocks // every) if every else 0
    return int(blocks * products + crossing * (4 * rows * width * width + 4 * rows * CLIP_TOKENS * width))


def measure(
    shapes: Iterable[Shape],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    conditioning: Conditioning = "both",
    steps: int = 10,
    guidance: float = 4.0,
    variants: Iterable[str] = USUAL,
    out: Path | None = None,
    seconds: float = 3.0,
    side: int = 8192,
    on_entry: Callable[[Entry], None] | None = None,
) -> ledger.Record:
    """Time the loops, and write the record to `out` after each shape, as `operations.measure` does.

    ValueError for a variant that there is not."""
    names = list(variants)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise ValueError(f"there is no variant {unknown[0]}; there are {', '.join(VARIANTS)}")
    table = flow_table(steps)
    word = str(dtype).removeprefix("torch.")
    protocol = {
        "steps": steps, "guidance": guidance, "solver": table.solver, "conditioning": conditioning, "variants": names,
        "seconds": seconds, "clip_tokens": CLIP_TOKENS, "weights": "random",
    }  # fmt: skip
    made = ledger.begin("sampling", device, protocol, out=out)
    known = {(entry["size"], entry["tokens"], entry["images"], entry["dtype"]) for entry in made["entries"]}
    limits: ceilings.Ceilings | None = None
    for shape in shapes:
        if (shape.size, shape.tokens, shape.images, word) in known:
            continue
        if limits is None:
            limits = ceilings.measure(device, side=side)
            made["ceilings"] = asdict(limits)
        logger.info("DiT-%s, %d tokens, %d images", shape.size, shape.tokens, shape.images)
        dit = network(shape, conditioning, device)
        timed, left_out = _measure(dit, shape, device, dtype, table, guidance, names, seconds)
        weights = sum(parameter.numel() for parameter in dit.blocks.parameters()) * dtype.itemsize
        entry = Entry(
            size=shape.size,
            tokens=shape.tokens,
            images=shape.images,
            dtype=word,
            floor_ms_per_step=limits.floor_us(weights, flops_of_step(dit, shape), "bf16") / 1000,
            variants=timed,
            left_out=left_out,
        )
        made["entries"].append(asdict(entry))
        if out is not None:
            ledger.write(made, out)
        if on_entry is not None:
            on_entry(entry)
    return made


@torch.inference_mode()
def _measure(
    dit: DiT,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    table: SamplingTable,
    guidance: float,
    names: list[str],
    seconds: float,
) -> tuple[dict[str, Timed], dict[str, str]]:
    """(times and errors, what did not run and why)."""
    noise, condition = _given(dit, shape, device)
    few = min(shape.images, 2)
    reference = EagerBackend(_pipeline(copy.deepcopy(dit)))
    wanted = reference.sample(noise[:few], condition.map(lambda tensor: tensor[:few]), table, guidance=guidance)
    reference.close()
    calls: dict[str, Callable[[], Tensor]] = {}
    backends: list[EagerBackend] = []
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            backend = VARIANTS[name](_pipeline(cast(DiT, nn.Module.to(copy.deepcopy(dit), dtype))))
            backends.append(backend)

            def call(backend: EagerBackend = backend) -> Tensor:
                return backend.sample(noise, condition, table, guidance=guidance)

            began = time.perf_counter()
            result = call()
            if isinstance(backend, GraphedBackend):  # the second call captures, and the third is the first replay
                result = [call(), call()][-1]
            errors[name] = float((result[:few] - wanted).norm() / wanted.norm())
            calls[name] = call
            logger.info("%s: ready after %.0f s, error %.1e", name, time.perf_counter() - began, errors[name])
        except Exception as error:  # of a model that int8 does not take, of a compiler, of memory
            if name == "ours":
                raise
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
    spreads = time_calls_ms(list(calls.values()), device, warm_up=0, seconds=seconds)
    for backend in backends:
        backend.close()
    torch.compiler.reset()
    count = len(table.rows)
    return {
        name: Timed(ms_per_step=_divided(spread, count), error=errors[name]) for name, spread in zip(calls, spreads, strict=True)
    }, left_out


def _divided(spread: Spread, count: int) -> Spread:
    values = {name: getattr(spread, name) / count for name in ("median", "low", "high", "p95")}
    return Spread(**values, count=spread.count)


def _given(dit: DiT, shape: Shape, device: torch.device) -> tuple[Tensor, Condition]:
    """Noise and a source, (images, ...), in float32."""
    patch = dit.config["patch"]
    rows = int(shape.tokens**0.5)
    if rows * rows != shape.tokens:
        raise ValueError(f"tokens is {shape.tokens}; wanted a square, such as 256 or 1024")
    latent = (CHANNELS, rows * patch, rows * patch)
    generator = torch.Generator(device).manual_seed(1)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    count = shape.images
    condition = Condition(tokens=draw(count, CLIP_TOKENS, CLIP_WIDTH), pooled=draw(count, 768), latent=draw(count, *latent))
    return seeded_noise(range(count), latent, device), condition


def _pipeline(dit: DiT) -> ClipDiTPipeline:
    """What a backend opens; nothing here encodes or decodes, so the VAE is diffusers' smallest."""
    return ClipDiTPipeline(dit, AutoencoderKL(latent_channels=CHANNELS), FlowMatching().to_scheduler(), None)
