"""A linear layer and what follows it in one product: bias and GELU, or the gate of SwiGLU, before the result is ever written.

y = gelu(x w^T + b), tanh approximation (Hendrycks & Gimelshein 2016), or y = silu(x w_g^T + b_g) (x w_u^T + b_u) with the two
weights one above the other (Shazeer 2020). Sums in float32, one rounding at the end.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from clipdit.model import ops as plain
from clipdit_kernels.launch import FLOATS, TYPES, interpreted, launch, not_multiplied, of_device, on_cpu, require, rows_of

TALL = 8
"""Tiles of rows that are done before the next tile of columns, so that weights are read from the cache."""


@triton.jit
def forward_kernel(
    x, weight, bias, out, rows, columns, inner,
    GATED: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """`DOT`: see clipdit_kernels.attention."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    band = tl.program_id(0) // (TALL * tiles_n)
    height = tl.minimum(tiles_m - band * TALL, TALL)
    within = tl.program_id(0) % (TALL * tiles_n)
    m = (band * TALL + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x += m[:, None].to(tl.int64) * inner + k[None, :]
    weight += n[None, :].to(tl.int64) * inner + k[:, None]
    dtype = out.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_K):
        left = tl.load(x + start, mask=(m[:, None] < rows) & (start + k[None, :] < inner), other=0.0).to(DOT)
        inside = (n[None, :] < columns) & (start + k[:, None] < inner)
        total = tl.dot(left, tl.load(weight + start, mask=inside, other=0.0).to(DOT), total, input_precision="ieee")
        if GATED:
            below = tl.load(weight + columns.to(tl.int64) * inner + start, mask=inside, other=0.0).to(DOT)
            gate = tl.dot(left, below, gate, input_precision="ieee")
    total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate += tl.load(bias + columns + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        total = total * tl.sigmoid(total) * gate
    else:
        # x (1 + tanh(u)) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        total *= tl.sigmoid(1.5957691216057308 * total * (1.0 + 0.044715 * total * total))
    at = m[:, None].to(tl.int64) * columns + n[None, :]
    tl.store(out + at, total.to(dtype), mask=(m[:, None] < rows) & (n[None, :] < columns))


def tile(rows: int, gated: bool) -> dict[str, int]:
    """What a program computes, and with how many warps: two sums of a gated one take twice the registers."""
    if rows <= 512 or gated:
        return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32 if gated else 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def _check(operation: str, x: Tensor, weight: Tensor, bias: Tensor, gated: bool) -> None:
    require(operation, x=rows_of(x) or not_multiplied(x.dtype))
    width, even = x.shape[-1], "an even number of rows" if gated else "rows"
    fine = weight.ndim == 2 and weight.shape[1] == width and (not gated or weight.shape[0] % 2 == 0) and weight.is_contiguous()
    got = f"has shape {tuple(weight.shape)}, strides {weight.stride()}"
    require(operation, w1=None if fine else f"{got}; wanted {even} of {width}, contiguous")
    fine = bias.shape == weight.shape[:1] and bias.dtype in FLOATS and bias.is_contiguous()
    require(
        operation,
        w1=None if weight.dtype == x.dtype else f"is of {weight.dtype}; wanted {x.dtype}, that of x",
        b1=None if fine else f"has shape {tuple(bias.shape)}; wanted ({weight.shape[0]},), contiguous",
    )
    require(operation, w1=of_device(weight, x), b1=of_device(bias, x))


def _launch(x: Tensor, weight: Tensor, bias: Tensor, gated: bool) -> Tensor:
    batch, tokens, width = x.shape
    rows, columns = batch * tokens, weight.shape[0] // (2 if gated else 1)
    out = torch.empty(batch, tokens, columns, dtype=x.dtype, device=x.device)
    config = tile(rows, gated)
    launch(
        forward_kernel, (triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"]),),
        x, weight, bias, out, rows, columns, width,
        GATED=gated, DOT=tl.float32 if interpreted() else TYPES[x.dtype], TALL=TALL, **config,
    )  # fmt: skip
    return out


def _launch_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check("gelu_mlp", x, weight, bias, gated=False)
    return _launch(x, weight, bias, gated=False)


def _launch_swiglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check("swiglu_mlp", x, weight, bias, gated=True)
    return _launch(x, weight, bias, gated=True)


@torch.library.custom_op("clipdit::linear_gelu", mutates_args=(), device_types="cuda")
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu_tanh(x w^T + b): the first half of `clipdit.model.ops.gelu_mlp`."""
    return _launch_gelu(x, weight, bias)


@torch.library.custom_op("clipdit::linear_swiglu", mutates_args=(), device_types="cuda")
def linear_swiglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The first half of `clipdit.model.ops.swiglu_mlp`."""
    return _launch_swiglu(x, weight, bias)


linear_gelu.register_kernel("cpu")(on_cpu(lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"), _launch_gelu))
linear_swiglu.register_kernel("cpu")(on_cpu(lambda x, w, b: plain.swiglu(F.linear(x, w, b)), _launch_swiglu))
linear_gelu.register_fake(lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))
linear_swiglu.register_fake(lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0] // 2))
