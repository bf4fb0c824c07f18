"""QK-norm (Dehghani et al. 2023) and rotary positions (Su et al. 2021) of the queries and keys of a packed projection, in one
pass, for an attention that does neither.

One program a token: all heads of its queries and keys, as two halves of a head, which rotary positions mix. In float32, one
rounding at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipdit_kernels.launch import launch


@triton.jit
def forward_kernel(
    qkv, out, q_weight, k_weight, cos, sin, heads, rows_per_image, batch_stride, row_stride,
    D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """HEADS and HALF are powers of two that hold the heads of queries and keys together, and half a head."""
    image, row = (tl.program_id(0) // rows_per_image).to(tl.int64), tl.program_id(0) % rows_per_image
    half: tl.constexpr = D // 2
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < 2 * heads) & (column < half)
    at = head * D + column
    qkv += image * batch_stride + row * row_stride
    a = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(qkv + at + half, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + EPS)[:, None]
        a *= inverse * _weight(q_weight, k_weight, head < heads, column, half)
        b *= inverse * _weight(q_weight + half, k_weight + half, head < heads, column, half)
    if ROTARY:
        turned = row * D + column
        before = a
        a = a * _position(cos + turned, column, half) - b * _position(sin + turned, column, half)
        b = b * _position(cos + turned + half, column, half) + before * _position(sin + turned + half, column, half)
    out += tl.program_id(0).to(tl.int64) * (2 * heads * D)
    tl.store(out + at, a.to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + half, b.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weight(q_weight, k_weight, is_query, column, half: tl.constexpr):
    of_query = tl.load(q_weight + column, mask=column < half, other=0.0).to(tl.float32)
    of_key = tl.load(k_weight + column, mask=column < half, other=0.0).to(tl.float32)
    return tl.where(is_query, of_query, of_key)


@triton.jit
def _position(pointer, column, half: tl.constexpr):
    return tl.load(pointer, mask=column < half, other=0.0)


def warps_for(numbers: int) -> int:
    return max(1, min(8, numbers // 512))


def _launch(
    qkv: Tensor, heads: int, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(queries, keys), each (B, N, heads d), views of one tensor."""
    batch, rows, width = qkv.shape
    width //= 3
    d = width // heads
    out = torch.empty(batch, rows, 2 * width, dtype=qkv.dtype, device=qkv.device)
    half, padded = triton.next_power_of_2(d // 2), triton.next_power_of_2(2 * heads)
    launch(
        forward_kernel, (batch * rows,), qkv, out, q_weight, k_weight, cos, sin, heads, rows, qkv.stride(0), qkv.stride(1),
        D=d, HALF=half, HEADS=padded, NORM=q_weight is not None, ROTARY=cos is not None, EPS=eps,
        num_warps=warps_for(half * padded),
    )  # fmt: skip
    q, k = out.chunk(2, dim=-1)
    return q, k
