"""Every fused operation in every type, at the widths of published DiTs: what is compiled ahead for GPUs."""

from collections.abc import Callable
from functools import partial

import torch

from clipdit_kernels import attention, norm

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


def self_attention(d: int, dtype: torch.dtype) -> None:
    heads, weight, table = HEADS[d], empty(d, dtype=dtype), empty(256, d, dtype=torch.float32)
    attention._launch_packed(empty(2, 256, 3 * heads * d, dtype=dtype), heads, weight, weight, table, table)


def cross_attention(d: int, dtype: torch.dtype) -> None:
    heads = HEADS[d]
    k, v = empty(2, 77, 2 * heads * d, dtype=dtype).chunk(2, dim=-1)
    attention._launch_cross(empty(2, 256, heads * d, dtype=dtype), k, v, heads)


CASES: dict[str, Callable[[], None]] = {}
for word, dtype in TYPES.items():
    for of in (branch_norm, norm_alone, branch_norm_backward):
        CASES |= {f"{of.__name__} {size} {word}": partial(of, width, dtype) for size, width in WIDTHS.items()}
    for of in (self_attention, cross_attention):
        CASES |= {f"{of.__name__} {d} {word}": partial(of, d, dtype) for d in HEADS}
