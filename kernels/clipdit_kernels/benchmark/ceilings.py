"""What the GPU at hand can do, measured as everything else is: the floor that times are compared with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdit_kernels.benchmark.timing import Recorded, in_turns_us, record
from clipdit_kernels.fp8 import SINCE


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Of one device, medians."""

    bytes_per_s: float
    """Read and written by a copy."""
    flop_per_s: dict[str, float]
    """By type of the factors: products of large matrices; a multiplication and an addition are two."""
    node_us: float
    """A node of a CUDA graph that does next to nothing, one after another."""

    def floor_us(self, bytes_moved: int, flops: int, dtype: str) -> float:
        """The least time for work that must move so many bytes and do so many operations."""
        return 1e6 * max(bytes_moved / self.bytes_per_s, flops / self.flop_per_s[dtype])


def measure(device: torch.device, *, side: int = 8192, seconds: float = 0.5) -> Ceilings:
    """`side` of the matrices; the copy is of side x side numbers of 4 bytes."""
    numbers = torch.randn(side, side, device=device)
    copied = torch.empty_like(numbers)
    half = numbers.bfloat16()
    other = torch.randn(side, side, device=device).bfloat16()
    integers = torch.randint(-127, 128, (side, side), device=device, dtype=torch.int8)
    small = torch.zeros(1, device=device)

    def copy() -> tuple[Tensor]:
        copied.copy_(numbers)
        return (small,)

    recorded = {
        "copy": record([copy], device),
        "bf16": record([lambda: (F.linear(half, other),)], device),
        "int8": record([lambda: (torch._int_mm(integers, integers.t()),)], device),
        "fp8": record([_product_of_8_bit_floats(half)], device),
        "node": _chain(small, device),
    }
    us = {name: spread.median for name, spread in in_turns_us(recorded, device, seconds=seconds).items()}
    return Ceilings(
        bytes_per_s=2 * numbers.numel() * numbers.element_size() / us["copy"] * 1e6,
        flop_per_s={name: 2 * side**3 / us[name] * 1e6 for name in ("bf16", "int8", "fp8")},
        node_us=us["node"],
    )


def _product_of_8_bit_floats(numbers: Tensor) -> Callable[[], tuple[Tensor]]:
    """Where they are not multiplied as they are, the product of wider ones, which is what is left to do there."""
    device = numbers.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < SINCE:
        return lambda: (F.linear(numbers, numbers),)
    small, scales = numbers.to(torch.float8_e4m3fn), torch.ones(len(numbers), 1, device=device)
    return lambda: (torch._scaled_mm(small, small.t(), scale_a=scales, scale_b=scales.t(), out_dtype=torch.bfloat16),)


def _chain(number: Tensor, device: torch.device) -> Recorded:
    def add() -> tuple[Tensor]:
        number.add_(1)
        return (number,)

    return record([add] * 256, device)
