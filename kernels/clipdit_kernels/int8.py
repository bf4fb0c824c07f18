"""Products of 8-bit integers, and bias, GELU and the quantisation of what comes next before anything is written.

Twins of `clipdit.model.int8_ops`. A tile of the sum is as long as a group, so each group's exact integer sum meets its scale in
registers.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from clipdit.model import int8_ops as plain
from clipdit.model.int8_ops import GROUP, LEAST, Int8Rows, Int8Weight
from clipdit.model.ops import PerImage, Rows
from clipdit_kernels import norm as norms
from clipdit_kernels.launch import FLOATS, architecture, launch, of_device, on_cpu, require

TALL = 8
"""Tiles of rows that are done before the next tile of columns, so that weights are read from the cache."""
BLOCK_M = 64
"""Rows of a tile: 128 took 1.1 times as long on an H200, whatever the shape."""
HOPPER = 90
"""Where 4 warps hold a tile. Elsewhere they would spill registers."""


@triton.jit
def forward_kernel(
    x, x_scales, weight, w_scales, bias, out, out_scales, rows, columns, inner,
    GELU: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, TALL: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, GROUP)
    band = tl.program_id(0) // (TALL * tiles_n)
    height = tl.minimum(tiles_m - band * TALL, TALL)
    within = tl.program_id(0) % (TALL * tiles_n)
    m = (band * TALL + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = within // height
    n = tile * GROUP + tl.arange(0, GROUP)
    k = tl.arange(0, GROUP)
    x += m[:, None].to(tl.int64) * inner + k[None, :]
    weight += n[None, :].to(tl.int64) * inner + k[:, None]
    total = tl.zeros((BLOCK_M, GROUP), tl.float32)
    for group in range(0, inner // GROUP):
        left = tl.load(x + group * GROUP, mask=m[:, None] < rows, other=0)
        right = tl.load(weight + group * GROUP, mask=n[None, :] < columns, other=0)
        scales = tl.load(x_scales + m.to(tl.int64) * (inner // GROUP) + group, mask=m < rows, other=0.0)
        total += tl.dot(left, right).to(tl.float32) * scales[:, None]
    total *= tl.load(w_scales + n, mask=n < columns, other=0.0)[None, :]
    total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    if GELU:
        total *= tl.sigmoid(1.5957691216057308 * total * (1.0 + 0.044715 * total * total))  # see mlp.activated
    at = m[:, None].to(tl.int64) * columns + n[None, :]
    inside = (m[:, None] < rows) & (n[None, :] < columns)
    if QUANTIZE:
        largest = tl.maximum(tl.max(tl.abs(total), axis=1), LEAST)
        tl.store(out + at, tl.floor(total * (127.0 / largest)[:, None] + 0.5).to(tl.int8), mask=inside)
        tl.store(out_scales + m.to(tl.int64) * (columns // GROUP) + tile, largest / 127.0, mask=m < rows)
    else:
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def _check(operation: str, x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor) -> None:
    fine = x.ndim == 3 and x.dtype == torch.int8 and x.is_contiguous() and x.numel() and x.shape[2] % GROUP == 0
    got = f"has shape {tuple(x.shape)}, strides {x.stride()}, of {x.dtype}"
    require(operation, x=None if fine else f"{got}; wanted (B, N, D) of int8, contiguous, D a multiple of {GROUP}")
    batch, rows, width = x.shape
    wanted = {
        "scales": (x_scales, (batch, rows, width // GROUP), (torch.float32,)),
        "weight": (weight, (weight.shape[0], width), (torch.int8,)),
        "weight_scales": (w_scales, (weight.shape[0],), (torch.float32,)),
        "bias": (bias, (weight.shape[0],), FLOATS),
    }
    for name, (tensor, shape, dtypes) in wanted.items():
        fine = tensor.shape == shape and tensor.dtype in dtypes and tensor.is_contiguous()
        got = f"has shape {tuple(tensor.shape)}, strides {tensor.stride()}, of {tensor.dtype}"
        of = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        require(operation, **{name: None if fine else f"{got}; wanted {shape} of {of}, contiguous"})
        require(operation, **{name: of_device(tensor, x)})


def _launch(
    x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor, dtype: torch.dtype | None, gelu: bool
) -> tuple[Tensor, Tensor]:
    """(out, its scales); `dtype` None is 8 bits again, else the scales are empty."""
    batch, tokens, width = x.shape
    rows, columns = batch * tokens, weight.shape[0]
    quantize = dtype is None
    groups = columns // GROUP if quantize else 0
    out = torch.empty(batch, tokens, columns, dtype=dtype or torch.int8, device=x.device)
    scales = torch.empty(batch, tokens, groups, dtype=torch.float32, device=x.device)
    launch(
        forward_kernel, (triton.cdiv(rows, BLOCK_M) * triton.cdiv(columns, GROUP),),
        x, x_scales, weight, w_scales, bias, out, scales, rows, columns, width,
        GELU=gelu, QUANTIZE=quantize, BLOCK_M=BLOCK_M, GROUP=GROUP, TALL=TALL, LEAST=LEAST,
        num_warps=4 if architecture() == HOPPER else 8, num_stages=3,
    )  # fmt: skip
    return out, scales


def _launch_linear(x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    _check("linear", x, x_scales, weight, w_scales, bias)
    require("linear", dtype=None if dtype in FLOATS else f"is {dtype}; wanted float32, bfloat16 or float16")
    return _launch(x, x_scales, weight, w_scales, bias, dtype, gelu=False)[0]


def _launch_gelu(x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    _check("gelu_mlp", x, x_scales, weight, w_scales, bias)
    wide = weight.shape[0] % GROUP
    require("gelu_mlp", w1=f"has {weight.shape[0]} rows; wanted a multiple of {GROUP}, which share a scale" if wide else None)
    return _launch(x, x_scales, weight, w_scales, bias, None, gelu=True)


@torch.library.custom_op("clipdit::linear_int8", mutates_args=(), device_types="cuda")
def linear_int8(x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """See `clipdit.model.int8_ops.linear`."""
    return _launch_linear(x, x_scales, weight, w_scales, bias, dtype)


@torch.library.custom_op("clipdit::linear_gelu_int8", mutates_args=(), device_types="cuda")
def linear_gelu_int8(x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The first half of `clipdit.model.int8_ops.gelu_mlp`: 8 bits in, 8 bits out."""
    return _launch_gelu(x, x_scales, weight, w_scales, bias)


def _plain_linear(x, x_scales, weight, w_scales, bias, dtype):
    return plain.linear(Int8Rows(x, x_scales), Int8Weight(weight, w_scales), bias, dtype)


def _plain_gelu(x, x_scales, weight, w_scales, bias):
    hidden = plain.linear(Int8Rows(x, x_scales), Int8Weight(weight, w_scales), bias, torch.float32)
    return tuple(plain.quantize_rows(F.gelu(hidden, approximate="tanh")))


linear_int8.register_kernel("cpu")(on_cpu(_plain_linear, _launch_linear))
linear_gelu_int8.register_kernel("cpu")(on_cpu(_plain_gelu, _launch_gelu))


@linear_int8.register_fake
def _(x, x_scales, weight, w_scales, bias, dtype):
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


@linear_gelu_int8.register_fake
def _(x, x_scales, weight, w_scales, bias):
    scales = x_scales.new_empty(*x.shape[:-1], weight.shape[0] // GROUP)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), scales


def linear(x: Int8Rows, weight: Int8Weight, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """See `clipdit.model.int8_ops.linear`."""
    return linear_int8(*x, *weight, bias, dtype)


def gelu_mlp(x: Int8Rows, w1: Int8Weight, b1: Tensor, w2: Int8Weight, b2: Tensor, *, dtype: torch.dtype) -> Tensor:
    """See `clipdit.model.int8_ops.gelu_mlp`."""
    return linear(Int8Rows(*linear_gelu_int8(*x, *w1, b1)), w2, b2, dtype)


def norm_modulate(x: Rows, shift: PerImage | None, scale: PerImage | None, *, norm: str = "layer", eps: float = 1e-6) -> Int8Rows:
    """See `clipdit.model.int8_ops.norm_modulate`."""
    return Int8Rows(*norms.alone_int8(x, shift, scale, norm, eps))


def gate_residual_norm_modulate(
    residual: Rows,
    branch: Rows,
    gate: PerImage | None,
    shift: PerImage | None,
    scale: PerImage | None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Rows, Int8Rows]:
    """See `clipdit.model.int8_ops.gate_residual_norm_modulate`."""
    residual, *rows = norms.both_int8(residual, branch, gate, shift, scale, norm, eps)
    return residual, Int8Rows(*rows)
