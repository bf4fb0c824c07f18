"""Products of 8-bit floats, twins of `clipdit.model.fp8_ops`: the product is cuBLASLt's, which takes a scale for each row of
either factor; norms, and GELU, emit what it reads."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdit.model import fp8_ops as plain
from clipdit.model.fp8_ops import DTYPE, Fp8Rows, Fp8Weight
from clipdit.model.ops import PerImage, Rows
from clipdit_kernels import norm as norms
from clipdit_kernels.launch import of_device, on_cpu, require
from clipdit_kernels.mlp import _launch_gelu_fp8

MULTIPLE = 16
"""Of which the widths of a product have to be (cuBLASLt)."""
SINCE = (8, 9)
"""Compute capability from which tensor cores multiply 8-bit floats: Ada."""


def why_not_on(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why 8-bit floats are not multiplied there, with results in `dtype`, in a line; None when they are."""
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < SINCE:
        return f"this GPU has compute capability {capability[0]}.{capability[1]}; 8-bit floats want 8.9 (Ada) or later. Use int8"
    if device.type == "cuda" and dtype != torch.bfloat16:
        return f"products of 8-bit floats come in bfloat16, and the model is of {dtype}. Open it in bfloat16"
    return None


def _multiply(x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    _check(x, x_scales, weight, w_scales, bias)
    made = torch._scaled_mm(
        x.flatten(0, 1), weight.t(), scale_a=x_scales.flatten(0, 1), scale_b=w_scales[None], bias=bias, out_dtype=dtype
    )
    return made.unflatten(0, x.shape[:2])


def _check(x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor) -> None:
    fine = x.ndim == 3 and x.dtype == DTYPE and x.is_contiguous() and x.numel() and x.shape[2] % MULTIPLE == 0
    got = f"has shape {tuple(x.shape)}, strides {x.stride()}, of {x.dtype}"
    require("linear", x=None if fine else f"{got}; wanted (B, N, D) of e4m3, contiguous, D a multiple of {MULTIPLE}")
    wide = weight.shape[0]
    wanted = {
        "scales": (x_scales, (*x.shape[:2], 1)),
        "weight": (weight, (wide, x.shape[2])),
        "weight_scales": (w_scales, (wide,)),
        "bias": (bias, (wide,)),
    }
    for name, (tensor, shape) in wanted.items():
        fine = tensor.shape == shape and tensor.is_contiguous()
        got = f"has shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        require("linear", **{name: (None if fine else f"{got}; wanted {shape}, contiguous") or of_device(tensor, x)})
    require("linear", weight=f"has {wide} rows; wanted a multiple of {MULTIPLE}" if wide % MULTIPLE else None)


@torch.library.custom_op("clipdit::linear_fp8", mutates_args=(), device_types="cuda")
def linear_fp8(x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """See `clipdit.model.fp8_ops.linear`."""
    return _multiply(x, x_scales, weight, w_scales, bias, dtype)


@torch.library.custom_op("clipdit::gelu_fp8", mutates_args=(), device_types="cuda")
def gelu_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU (tanh) of (B, N, F), in 8 bits with one scale a row."""
    return _launch_gelu_fp8(x)


def _plain_linear(x, x_scales, weight, w_scales, bias, dtype):
    _check(x, x_scales, weight, w_scales, bias)
    return plain.linear(Fp8Rows(x, x_scales), Fp8Weight(weight, w_scales), bias, dtype)


def _plain_gelu(x):
    return tuple(plain.quantize_rows(F.gelu(x.float(), approximate="tanh")))


linear_fp8.register_kernel("cpu")(_plain_linear)
gelu_fp8.register_kernel("cpu")(on_cpu(_plain_gelu, _launch_gelu_fp8))


@linear_fp8.register_fake
def _(x, x_scales, weight, w_scales, bias, dtype):
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


@gelu_fp8.register_fake
def _(x):
    return torch.empty_like(x, dtype=DTYPE), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def linear(x: Fp8Rows, weight: Fp8Weight, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """See `clipdit.model.fp8_ops.linear`."""
    return linear_fp8(*x, *weight, bias, dtype)


def gelu_mlp(x: Fp8Rows, w1: Fp8Weight, b1: Tensor, w2: Fp8Weight, b2: Tensor, *, dtype: torch.dtype) -> Tensor:
    """See `clipdit.model.fp8_ops.gelu_mlp`."""
    return linear(Fp8Rows(*gelu_fp8(linear(x, w1, b1, dtype))), w2, b2, dtype)


def norm_modulate(x: Rows, shift: PerImage | None, scale: PerImage | None, *, norm: str = "layer", eps: float = 1e-6) -> Fp8Rows:
    """See `clipdit.model.fp8_ops.norm_modulate`."""
    return Fp8Rows(*norms.alone_fp8(x, shift, scale, norm, eps))


def gate_residual_norm_modulate(
    residual: Rows,
    branch: Rows,
    gate: PerImage | None,
    shift: PerImage | None,
    scale: PerImage | None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Rows, Fp8Rows]:
    """See `clipdit.model.fp8_ops.gate_residual_norm_modulate`."""
    residual, *rows = norms.both_fp8(residual, branch, gate, shift, scale, norm, eps)
    return residual, Fp8Rows(*rows)
