"""softmax(q k^T / sqrt(d)) v over all heads, read from where the projections left it and written as the next one wants it.

Queries, keys and values are (B, N, heads d) with any distance between rows, so a packed projection needs no copies; QK-norm
(Dehghani et al. 2023) and rotary positions (Su et al. 2021) are done on the way in. Online softmax (Milakov & Gimelshein 2018;
Dao et al. 2022) in float32, with 2^x.

A head that is no power of two wide is read in two parts, the largest power of two in it and the rest: 72 is 64 + 16, which
multiplies 1.1 times the numbers there are, where 128 would be 1.8 times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipdit.model import ops as plain
from clipdit_kernels.launch import FLOATS, TYPES, interpreted, launch, not_multiplied, of_device, on_cpu, require

HEAD_WIDTHS = (16, 256)
"""Narrowest and widest head; a tensor core multiplies 16 at a time."""
LONGEST = 65_536
"""Tokens of a sequence."""
_LOG2_E = 1.4426950408889634


@triton.jit
def read(pointer, rows, stride, limit, columns, D: tl.constexpr):
    """Numbers of a head at `rows` and `columns`; 0 outside."""
    at = rows[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(pointer + at, mask=(rows[:, None] < limit) & (columns[None, :] < D), other=0.0)


@triton.jit
def prepared(
    pointer, rows, stride, limit, columns, inverse, weight, cos, sin,
    D: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """`read`, in float32, with QK-norm and rotary positions. `inverse` is 1 / rms of the rows."""
    x = read(pointer, rows, stride, limit, columns, D).to(tl.float32)
    inside = columns < D
    if NORM:
        x *= inverse[:, None] * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if ROTARY:
        half: tl.constexpr = D // 2
        others = tl.where(columns < half, columns + half, columns - half)
        y = read(pointer, rows, stride, limit, others, D).to(tl.float32)
        if NORM:
            y *= inverse[:, None] * tl.load(weight + others, mask=inside, other=0.0).to(tl.float32)[None, :]
        y = tl.where((columns < half)[None, :], -y, y)
        x = x * read(cos, rows, D, limit, columns, D) + y * read(sin, rows, D, limit, columns, D)
    return x


@triton.jit
def inverse_rms(pointer, rows, stride, limit, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, EPS: tl.constexpr):
    x = read(pointer, rows, stride, limit, tl.arange(0, D1), D).to(tl.float32)
    squares = tl.sum(x * x, axis=1)
    if D2 > 0:
        x = read(pointer, rows, stride, limit, D1 + tl.arange(0, D2), D).to(tl.float32)
        squares += tl.sum(x * x, axis=1)
    return tl.rsqrt(squares / D + EPS)


@triton.jit
def forward_kernel(
    q, k, v, out, q_weight, k_weight, cos, sin,
    heads, q_rows, k_rows, q_batch, q_stride, k_batch, k_stride, v_batch, v_stride, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, ROTARY: tl.constexpr, EPS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`DOT` is what products are computed in: the type of q, except in the interpreter, which cannot multiply bfloat16."""
    image, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    q += image * q_batch + head * D
    k += image * k_batch + head * D
    v += image * v_batch + head * D
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    first = tl.arange(0, D1)
    dtype = v.dtype.element_ty

    inverse = rows.to(tl.float32)
    if NORM:
        inverse = inverse_rms(q, rows, q_stride, q_rows, D, D1, D2, EPS)
    q1 = prepared(q, rows, q_stride, q_rows, first, inverse, q_weight, cos, sin, D, NORM, ROTARY)
    q1 = (q1 * scale).to(dtype).to(DOT)
    best = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    sum1 = tl.zeros((BLOCK_Q, D1), tl.float32)
    if D2 > 0:
        second = D1 + tl.arange(0, D2)
        q2 = prepared(q, rows, q_stride, q_rows, second, inverse, q_weight, cos, sin, D, NORM, ROTARY)
        q2 = (q2 * scale).to(dtype).to(DOT)
        sum2 = tl.zeros((BLOCK_Q, D2), tl.float32)

    for start in range(0, k_rows, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        inverse_k = keys.to(tl.float32)
        if NORM:
            inverse_k = inverse_rms(k, keys, k_stride, k_rows, D, D1, D2, EPS)
        k1 = prepared(k, keys, k_stride, k_rows, first, inverse_k, k_weight, cos, sin, D, NORM, ROTARY).to(dtype).to(DOT)
        scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        if D2 > 0:
            k2 = prepared(k, keys, k_stride, k_rows, second, inverse_k, k_weight, cos, sin, D, NORM, ROTARY).to(dtype).to(DOT)
            scores += tl.dot(q2, tl.trans(k2), input_precision="ieee")
        scores = tl.where((keys < k_rows)[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        shrink = tl.exp2(best - higher)
        shares = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(shares, axis=1)
        weights = shares.to(dtype).to(DOT)
        sum1 = sum1 * shrink[:, None] + tl.dot(weights, read(v, keys, v_stride, k_rows, first, D).to(DOT), input_precision="ieee")
        if D2 > 0:
            values = read(v, keys, v_stride, k_rows, second, D).to(DOT)
            sum2 = sum2 * shrink[:, None] + tl.dot(weights, values, input_precision="ieee")
        best = higher

    at = (image * q_rows + rows[:, None]) * (heads * D) + head * D
    tl.store(out + at + first[None, :], (sum1 / total[:, None]).to(dtype), mask=(rows[:, None] < q_rows) & (first[None, :] < D))
    if D2 > 0:
        inside = (rows[:, None] < q_rows) & (second[None, :] < D)
        tl.store(out + at + second[None, :], (sum2 / total[:, None]).to(dtype), mask=inside)


def parts_of(head_width: int) -> tuple[int, int]:
    """(D1, D2): the largest power of two in a head's width, and the power of two, at least 16, that holds the rest; 0 is none."""
    first = 1 << (head_width.bit_length() - 1)
    rest = head_width - first
    return first, max(16, triton.next_power_of_2(rest)) if rest else 0


def tile(head_width: int, rows: int) -> dict[str, int]:
    """Queries and keys that a program holds, and its warps: wide heads leave room for fewer, and so do heads in two parts, which
    with 64 keys spill registers on Ampere and on Blackwell's small cards."""
    if head_width > 128:
        return {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    if parts_of(head_width)[1]:
        return {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if rows <= 64:
        return {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}


def _rows(tensor: Tensor, heads: int, *, like: Tensor | None = None) -> str | None:
    """Why a tensor is not (B, N, heads d) with numbers of a row next to each other; None when it is."""
    low, high = HEAD_WIDTHS
    if tensor.ndim != 3:
        return f"has shape {tuple(tensor.shape)}; wanted (B, N, heads d)"
    if tensor.dtype not in FLOATS:
        return f"is of {tensor.dtype}; wanted float32, bfloat16 or float16"
    if (reason := not_multiplied(tensor.dtype)) is not None:
        return reason
    if not tensor.numel():
        return f"is empty, {tuple(tensor.shape)}; wanted at least one row"
    if tensor.stride(2) != 1:
        return f"has strides {tensor.stride()}; wanted neighbours in a row next to each other. Call .contiguous()"
    if tensor.shape[1] > LONGEST:
        return f"has {tensor.shape[1]:,} tokens; wanted at most {LONGEST:,}"
    if tensor.shape[2] % heads or not low <= tensor.shape[2] // heads <= high or (tensor.shape[2] // heads) % 4:
        return f"is {tensor.shape[2]} wide with {heads} heads; wanted heads of {low} to {high} numbers, a multiple of 4"
    if like is not None and (tensor.shape[0], tensor.shape[2]) != (like.shape[0], like.shape[2]):
        return f"has shape {tuple(tensor.shape)}; wanted ({like.shape[0]}, M, {like.shape[2]})"
    if like is not None and tensor.dtype != like.dtype:
        return f"is of {tensor.dtype}; wanted {like.dtype}, that of the queries"
    return of_device(tensor, like)


def _vector(tensor: Tensor | None, shape: tuple[int, ...], q: Tensor) -> str | None:
    if tensor is None:
        return None
    if tensor.shape != shape or not tensor.is_contiguous():
        return f"has shape {tuple(tensor.shape)}, strides {tensor.stride()}; wanted {shape}, contiguous"
    return of_device(tensor, q)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, heads: int,
    q_weight: Tensor | None = None, k_weight: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    batch, rows, width = q.shape
    d = width // heads
    first, rest = parts_of(d)
    out = torch.empty(batch, rows, width, dtype=q.dtype, device=q.device)
    config = tile(d, rows)
    launch(
        forward_kernel, (triton.cdiv(rows, config["BLOCK_Q"]), batch * heads),
        q, k, v, out, q_weight, k_weight, cos, sin,
        heads, rows, k.shape[1], q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), d**-0.5 * _LOG2_E,
        D=d, D1=first, D2=rest, NORM=q_weight is not None, ROTARY=cos is not None, EPS=eps,
        DOT=tl.float32 if interpreted() else TYPES[q.dtype], **config,
    )  # fmt: skip
    return out


def _launch_cross(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    require("attention", heads=None if heads > 0 else f"is {heads}; wanted at least 1")
    require("attention", q=_rows(q, heads))
    require("attention", k=_rows(k, heads, like=q), v=_rows(v, heads, like=q))
    require("attention", v=None if v.shape == k.shape else f"has shape {tuple(v.shape)}; wanted {tuple(k.shape)}, that of k")
    return _launch(q, k, v, heads)


def _launch_packed(
    qkv: Tensor, heads: int, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    wide = qkv.ndim == 3 and qkv.shape[2] % 3 == 0
    require("qkv_attention", qkv=None if wide else f"has shape {tuple(qkv.shape)}; wanted (B, N, 3 heads d)")
    q, k, v = qkv.chunk(3, dim=-1)
    require("qkv_attention", heads=None if heads > 0 else f"is {heads}; wanted at least 1")
    require("qkv_attention", qkv=_rows(q, heads))
    d, positions = q.shape[2] // heads, (q.shape[1], q.shape[2] // heads)
    floats = None if cos is None or cos.dtype == torch.float32 else f"is of {cos.dtype}; wanted float32"
    require(
        "qkv_attention",
        q_weight=_vector(q_weight, (d,), q) if (q_weight is None) == (k_weight is None) else "or k_weight is None; wanted both",
        k_weight=_vector(k_weight, (d,), q),
        rotary=floats or _vector(cos, positions, q) or _vector(sin, positions, q),
    )
    return _launch(q, k, v, heads, q_weight, k_weight, cos, sin)


@torch.library.custom_op("clipdit::attention", mutates_args=(), device_types="cuda")
def cross(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """See `clipdit.model.ops.attention`."""
    return _launch_cross(q, k, v, heads)


@torch.library.custom_op("clipdit::qkv_attention", mutates_args=(), device_types="cuda")
def packed(
    qkv: Tensor, heads: int, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    """See `clipdit.model.ops.qkv_attention`."""
    return _launch_packed(qkv, heads, q_weight, k_weight, cos, sin)


def _plain_cross(q, k, v, heads):
    return plain.attention(q, k, v, heads=heads)


def _plain_packed(qkv, heads, q_weight, k_weight, cos, sin):
    rotary = None if cos is None else (cos, sin)
    return plain.qkv_attention(qkv, heads=heads, q_weight=q_weight, k_weight=k_weight, rotary=rotary)


cross.register_kernel("cpu")(on_cpu(_plain_cross, _launch_cross))
packed.register_kernel("cpu")(on_cpu(_plain_packed, _launch_packed))
cross.register_fake(lambda q, k, v, heads: q.new_empty(q.shape))
packed.register_fake(lambda qkv, *_: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3))
