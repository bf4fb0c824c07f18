"""The first linear layer of an MLP with what follows it: bias and GELU behind cuBLASLt's product, or the gate of SwiGLU.

y = gelu(x w^T + b), tanh approximation (Hendrycks & Gimelshein 2016), or y = silu(x w_g^T + b_g) (x w_u^T + b_u) with the two
weights one above the other (Shazeer 2020). The product is cuBLASLt's: a Triton kernel that did it all took 1.4 to 2 times as long
on an H200 (docs/kernels.md).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from clipdit.model import ops as plain
from clipdit.model.fp8_ops import DTYPE, LARGEST
from clipdit.model.int8_ops import LEAST
from clipdit_kernels.launch import FLOATS, launch, of_device, on_cpu, parts_of, require, rows_of

BLOCK = 1024
WIDEST = 32_768
"""Numbers of a row that one program holds in registers."""


@triton.jit
def swiglu_kernel(x, out, columns, BLOCK: tl.constexpr):
    """(rows, 2 columns) to (rows, columns)."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    gate = tl.load(x + row * 2 * columns + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * columns + columns + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def activated(x, columns, inside):
    """GELU of numbers of a row, in float32."""
    y = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    # y (1 + tanh(u)) / 2 = y sigmoid(2 u), u = sqrt(2 / pi) (y + 0.044715 y^3)
    return y * tl.sigmoid(1.5957691216057308 * y * (1.0 + 0.044715 * y * y))


@triton.jit
def gelu_fp8_kernel(
    x, out, scales, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr
):  # fmt: skip
    """GELU of a row, in two parts as in clipdit_kernels.norm, in 8 bits with one scale."""
    at = tl.program_id(0).to(tl.int64) * D
    first = tl.arange(0, D1)
    y1 = activated(x + at, first, first < D)
    largest = tl.maximum(tl.max(tl.abs(y1), axis=0), LEAST)
    if D2 > 0:
        second = D1 + tl.arange(0, D2)
        y2 = activated(x + at, second, second < D)
        largest = tl.maximum(tl.max(tl.abs(y2), axis=0), largest)
        tl.store(out + at + second, (y2 * (LARGEST / largest)).to(out.dtype.element_ty), mask=second < D)
    tl.store(out + at + first, (y1 * (LARGEST / largest)).to(out.dtype.element_ty), mask=first < D)
    tl.store(scales + tl.program_id(0), largest / LARGEST)


def _check(operation: str, x: Tensor, weight: Tensor, bias: Tensor, gated: bool) -> None:
    require(operation, x=rows_of(x))
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


def _launch_gate(x: Tensor) -> Tensor:
    """(B, N, 2 F) to (B, N, F)."""
    batch, tokens, width = x.shape
    out = torch.empty(batch, tokens, width // 2, dtype=x.dtype, device=x.device)
    grid = batch * tokens, triton.cdiv(width // 2, BLOCK)
    launch(swiglu_kernel, grid, x, out, width // 2, BLOCK=BLOCK, num_warps=4)
    return out


def _launch_gelu_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, F) to (e4m3, one scale a row)."""
    width = x.shape[-1]
    require("gelu_mlp", w1=None if width <= WIDEST else f"has {width} rows; wanted at most {WIDEST}")
    numbers, scales = torch.empty_like(x, dtype=DTYPE), torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    first, rest = parts_of(width)
    launch(
        gelu_fp8_kernel, (x.numel() // width,), x, numbers, scales,
        D=width, D1=first, D2=rest, LARGEST=LARGEST, LEAST=LEAST, num_warps=max(1, first // 1024),
    )  # fmt: skip
    return numbers, scales


def _gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check("gelu_mlp", x, weight, bias, gated=False)
    return torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True).unflatten(0, x.shape[:2])


def _plain_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check("gelu_mlp", x, weight, bias, gated=False)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _swiglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check("swiglu_mlp", x, weight, bias, gated=True)
    return _launch_gate(F.linear(x, weight, bias))


def _plain_swiglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return plain.swiglu(F.linear(x, weight, bias))


@torch.library.custom_op("clipdit::linear_gelu", mutates_args=(), device_types="cuda")
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu_tanh(x w^T + b): the first half of `clipdit.model.ops.gelu_mlp`."""
    return _gelu(x, weight, bias)


@torch.library.custom_op("clipdit::linear_swiglu", mutates_args=(), device_types="cuda")
def linear_swiglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The first half of `clipdit.model.ops.swiglu_mlp`."""
    return _swiglu(x, weight, bias)


linear_gelu.register_kernel("cpu")(_plain_gelu)
linear_swiglu.register_kernel("cpu")(on_cpu(_plain_swiglu, _swiglu))
linear_gelu.register_fake(lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))
linear_swiglu.register_fake(lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0] // 2))
