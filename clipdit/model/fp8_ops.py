"""The plain definition of products of 8-bit floats (e4m3), with what produces their input emitting it so.

A row of activations has one scale, and so has a row of a weight: what the tensor cores of Ada, Hopper and Blackwell multiply as
it is. An 8-bit float carries a number to 1 part in 16 whatever its size, so a channel that stands out costs the others little,
where integers (`int8_ops`) need scales in groups. Scales are largest / 448; sums are in float32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clipdit.model import ops
from clipdit.model.int8_ops import LEAST
from clipdit.model.ops import PerImage, Rows

LARGEST = 448.0
"""Of e4m3."""
DTYPE = torch.float8_e4m3fn


class Fp8Rows(NamedTuple):
    """Activations."""

    numbers: Float[Tensor, "B N D"]
    """e4m3."""
    scales: Float[Tensor, "B N 1"]
    """float32, one a row."""


class Fp8Weight(NamedTuple):
    """Of a linear layer."""

    numbers: Float[Tensor, "F D"]
    """e4m3."""
    scales: Float[Tensor, "F"]
    """float32, one for each output."""


def quantize_rows(x: Float[Tensor, "B N D"]) -> Fp8Rows:
    """Each row by its largest."""
    wide = ops.at_least_fp32(x)
    largest = wide.abs().amax(-1, keepdim=True).clamp_min(LEAST)
    return Fp8Rows((wide * (LARGEST / largest)).to(DTYPE), (largest / LARGEST).float())


def quantize_weight(weight: Float[Tensor, "F D"]) -> Fp8Weight:
    """Each row by its largest."""
    numbers, scales = quantize_rows(weight[None])
    return Fp8Weight(numbers[0], scales[0, :, 0])


def dequantize(x: Fp8Rows) -> Float[Tensor, "B N D"]:
    """The numbers that are meant, float32."""
    return x.numbers.float() * x.scales


def linear(x: Fp8Rows, weight: Fp8Weight, bias: Float[Tensor, "F"], dtype: torch.dtype) -> Float[Tensor, "B N F"]:
    """x w^T + b in `dtype`."""
    total = F.linear(x.numbers.float(), weight.numbers.float()) * x.scales * weight.scales
    return (total + bias.float()).to(dtype)


def gelu_mlp(
    x: Fp8Rows, w1: Fp8Weight, b1: Float[Tensor, "F"], w2: Fp8Weight, b2: Float[Tensor, "D"], *, dtype: torch.dtype
) -> Rows:
    """`clipdit.model.ops.gelu_mlp`, with the hidden numbers in `dtype` before GELU and in 8 bits behind it."""
    hidden = quantize_rows(F.gelu(ops.at_least_fp32(linear(x, w1, b1, dtype)), approximate="tanh"))
    return linear(hidden, w2, b2, dtype)


def norm_modulate(x: Rows, shift: PerImage | None, scale: PerImage | None, *, norm: str = "layer", eps: float = 1e-6) -> Fp8Rows:
    """`clipdit.model.ops.norm_modulate`, computed in float32 and emitted in 8 bits."""
    return quantize_rows(ops.norm_modulate(ops.at_least_fp32(x), shift, scale, norm=norm, eps=eps))


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
    """`clipdit.model.ops.gate_residual_norm_modulate`, the norm in 8 bits, the residual in its own type."""
    residual = ops.gate_residual(residual, branch, gate)
    return residual, norm_modulate(residual, shift, scale, norm=norm, eps=eps)
