"""Every fused operation in every type, at the widths of published DiTs: what is compiled ahead for GPUs."""

from collections.abc import Callable
from functools import partial

import torch

from clipdit_kernels import attention, int8, mlp, norm, rotary, solver

CAPABILITIES = (80, 90, 120)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTHS = {"S": 384, "B": 768, "L": 1024, "XL": 1152}
HEADS = {64: 12, 72: 16}


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def branch_norm(width: int, dtype: torch.dtype) -> None:
    x, rows = empty(2, 256, width, dtype=dtype), empty(2, 6, width, dtype=dtype).split(1, dim=1)
    norm._launch(x, torch.empty_like(x), rows[2], rows[3], rows[4], "layer", 1e-6)


def norm_alone(width: int, dtype: torch.dtype) -> None:
    x, rows = empty(2, 256, width, dtype=dtype), empty(2, 6, width, dtype=dtype).split(1, dim=1)
    norm._launch(x, None, None, rows[0], rows[1], "layer", 1e-6)


def branch_norm_backward(width: int, dtype: torch.dtype) -> None:
    x, rows = empty(2, 256, width, dtype=dtype), empty(2, 6, width, dtype=dtype).split(1, dim=1)
    norm._launch_backward(x, x.clone(), rows[2], rows[4], x.clone(), x.clone(), "layer", 1e-6)


def rotary_positions(d: int, dtype: torch.dtype) -> None:
    heads, weight, table = HEADS[d], empty(d, dtype=dtype), empty(256, d, dtype=torch.float32)
    rotary._launch(empty(2, 256, 3 * heads * d, dtype=dtype), heads, weight, weight, table, table)


def self_attention(d: int, dtype: torch.dtype) -> None:
    heads = HEADS[d]
    attention._launch_packed(empty(2, 256, 3 * heads * d, dtype=dtype), heads, None, None, None, None)


def cross_attention(d: int, dtype: torch.dtype) -> None:
    heads = HEADS[d]
    k, v = empty(2, 77, 2 * heads * d, dtype=dtype).chunk(2, dim=-1)
    attention._launch_cross(empty(2, 256, heads * d, dtype=dtype), k, v, heads)


def swiglu(width: int, dtype: torch.dtype) -> None:
    mlp._launch_gate(empty(2, 256, 8 * width, dtype=dtype))


def gelu_fp8(width: int, dtype: torch.dtype) -> None:
    mlp._launch_gelu_fp8(empty(2, 256, 4 * width, dtype=dtype))


def guided_step(guidance: float, dtype: torch.dtype) -> None:
    x, copies = empty(2, 4, 32, 32, dtype=torch.float32), 1 if guidance == 1.0 else 2
    solver._launch(x, torch.empty_like(x), empty(copies * 2, 4, 32, 32, dtype=dtype), empty(6, dtype=torch.float32), guidance)


def branch_norm_int8(width: int, dtype: torch.dtype) -> None:
    x, rows = empty(2, 256, width, dtype=dtype), empty(2, 6, width, dtype=dtype).split(1, dim=1)
    norm._launch_both_int8(x, torch.empty_like(x), rows[2], rows[3], rows[4], "layer", 1e-6)


def branch_norm_fp8(width: int, dtype: torch.dtype) -> None:
    x, rows = empty(2, 256, width, dtype=dtype), empty(2, 6, width, dtype=dtype).split(1, dim=1)
    norm._launch_both_fp8(x, torch.empty_like(x), rows[2], rows[3], rows[4], "layer", 1e-6)


def int8_rows(images: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    scales = empty(images, 256, width // int8.GROUP, dtype=torch.float32)
    return empty(images, 256, width, dtype=torch.int8), scales


def linear_int8(width: int, dtype: torch.dtype) -> None:
    weight, scales = empty(3 * width, width, dtype=torch.int8), empty(3 * width, dtype=torch.float32)
    int8._launch_linear(*int8_rows(2, width), weight, scales, empty(3 * width, dtype=dtype), dtype)


def linear_gelu_int8(width: int, dtype: torch.dtype) -> None:
    weight, scales = empty(4 * width, width, dtype=torch.int8), empty(4 * width, dtype=torch.float32)
    int8._launch_gelu(*int8_rows(16, width), weight, scales, empty(4 * width, dtype=dtype))


CASES: dict[str, Callable[[], None]] = {}
"""Tensor cores multiply half precision, so the products have no float32."""
for word, dtype in TYPES.items():
    for of in (branch_norm, norm_alone, branch_norm_backward):
        CASES |= {f"{of.__name__} {size} {word}": partial(of, width, dtype) for size, width in WIDTHS.items()}
    CASES |= {f"guided_step {guidance} {word}": partial(guided_step, guidance, dtype) for guidance in (1.0, 4.0)}
    if word != "fp32":
        for of in (self_attention, cross_attention):
            CASES |= {f"{of.__name__} {d} {word}": partial(of, d, dtype) for d in HEADS}
        CASES |= {f"rotary_positions {d} {word}": partial(rotary_positions, d, dtype) for d in HEADS}
        for of in (swiglu, gelu_fp8):
            CASES |= {f"{of.__name__} {size} {word}": partial(of, WIDTHS[size], dtype) for size in ("S", "XL")}
        for of in (branch_norm_int8, branch_norm_fp8, linear_int8, linear_gelu_int8):
            CASES |= {f"{of.__name__} {size} {word}": partial(of, width, dtype) for size, width in WIDTHS.items()}


def capabilities(name: str) -> tuple[int, ...]:
    """Those that a case is for: no GPU before Ada knows e4m3."""
    return tuple(capability for capability in CAPABILITIES if capability >= 89 or "fp8" not in name)
