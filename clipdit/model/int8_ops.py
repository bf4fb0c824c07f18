"""The plain definition of W8A8: products of 8-bit integers, with what produces their input emitting it in 8 bits.

A row of activations is cut into groups of GROUP numbers, each with a scale of its own; a row of a weight has one scale. So a
channel that stands out costs its group and not the row. Scales are largest / 127, rounding is to the nearest, sums within a group
are exact integers, and groups are added in float32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor

from clipdit.model import ops
from clipdit.model.ops import PerImage, Rows

GROUP = 128
"""Numbers of a row that share a scale; the width of a model must be a multiple."""
LEAST = 1e-30
"""Of the largest number of a group: so that a group of zeros has a scale to divide by."""


class Int8Rows(NamedTuple):
    """Activations."""

    numbers: Int8[Tensor, "B N D"]
    scales: Float[Tensor, "B N G"]
    """float32, one for each GROUP numbers."""


class Int8Weight(NamedTuple):
    """Of a linear layer."""

    numbers: Int8[Tensor, "F D"]
    scales: Float[Tensor, "F"]
    """float32, one for each output."""


def quantize_rows(x: Float[Tensor, "B N D"]) -> Int8Rows:
    """Each group of GROUP numbers by its largest. ValueError for a width that is no multiple of GROUP."""
    if x.shape[-1] % GROUP:
        raise ValueError(f"rows are {x.shape[-1]} wide; wanted a multiple of {GROUP}, which share a scale")
    grouped = ops.at_least_fp32(x).unflatten(-1, (-1, GROUP))
    largest = grouped.abs().amax(-1).clamp_min(LEAST)
    return Int8Rows(_round(grouped * (127 / largest)[..., None]).flatten(-2), (largest / 127).float())


def quantize_weight(weight: Float[Tensor, "F D"]) -> Int8Weight:
    """Each row by its largest."""
    largest = weight.float().abs().amax(-1).clamp_min(LEAST)
    return Int8Weight(_round(weight.float() * (127 / largest)[:, None]), largest / 127)


def _round(x: Tensor) -> Int8[Tensor, "..."]:
    return (x + 0.5).floor().clamp(-127, 127).to(torch.int8)


def dequantize(x: Int8Rows) -> Float[Tensor, "B N D"]:
    """The numbers that are meant, float32."""
    return (x.numbers.float().unflatten(-1, (-1, GROUP)) * x.scales[..., None]).flatten(-2)


def linear(x: Int8Rows, weight: Int8Weight, bias: Float[Tensor, "F"], dtype: torch.dtype) -> Float[Tensor, "B N F"]:
    """x w^T + b in `dtype`."""
    total = bias.float()
    for start in range(0, x.numbers.shape[-1], GROUP):
        # exact in float32: 128 products of at most 127 * 127 are less than 2^24
        part = F.linear(x.numbers[..., start : start + GROUP].float(), weight.numbers[:, start : start + GROUP].float())
        total = total + part * x.scales[..., start // GROUP, None] * weight.scales
    return total.to(dtype)


def gelu_mlp(
    x: Int8Rows, w1: Int8Weight, b1: Float[Tensor, "F"], w2: Int8Weight, b2: Float[Tensor, "D"], *, dtype: torch.dtype
) -> Rows:
    """`clipdit.model.ops.gelu_mlp`, the hidden numbers in 8 bits too."""
    hidden = quantize_rows(F.gelu(linear(x, w1, b1, torch.float32), approximate="tanh"))
    return linear(hidden, w2, b2, dtype)


def norm_modulate(x: Rows, shift: PerImage | None, scale: PerImage | None, *, norm: str = "layer", eps: float = 1e-6) -> Int8Rows:
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
) -> tuple[Rows, Int8Rows]:
    """`clipdit.model.ops.gate_residual_norm_modulate`, the norm in 8 bits, the residual in its own type."""
    residual = ops.gate_residual(residual, branch, gate)
    return residual, norm_modulate(residual, shift, scale, norm=norm, eps=eps)
