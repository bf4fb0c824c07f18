"""softmax(q k^T / sqrt(d)) v over all heads, read from where the projections left it and written as the next one wants it.

Queries, keys and values are (B, N, heads d) with any distance between rows, so a packed projection needs no copies. Online
softmax (Milakov & Gimelshein 2018; Dao et al. 2022) in float32, with 2^x. QK-norm and rotary positions come before it, in one
pass of their own (clipdit_kernels.rotary): on the way in, every program would do them again for all keys, which took 1.7 to 5
times as long in all on an H200.

A head that is no power of two wide is read in two parts, the largest power of two in it and the rest: 72 is 64 + 16, which
multiplies 1.1 times the numbers there are, where 128 would be 1.8 times.

The kernel is faster than what PyTorch brings where all its programs run at once, and slower where they do not: `ours_is_faster`.
And a compiler makes wrong code of it where rows are an odd distance apart: `aligned`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from clipdit.model import ops as plain
from clipdit.torch_backend import attention_order
from clipdit_kernels import rotary
from clipdit_kernels.launch import FLOATS, TYPES, interpreted, launch, not_multiplied, of_device, on_cpu, parts_of, require

HEAD_WIDTHS = (16, 256)
"""Narrowest and widest head; a tensor core multiplies 16 at a time."""
LONGEST = 65_536
"""Tokens of a sequence."""
BLOCK_Q = 64
"""Queries that a program holds."""
AT_ONCE = 264
"""Programs: two for each multiprocessor of an H200."""
ALIGNED = 16
"""Bytes at which a tensor begins, and numbers of which its distances are multiples, where Triton knows both of an argument."""
_LOG2_E = 1.4426950408889634

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@triton.jit
def read(pointer, rows, stride, limit, columns, D: tl.constexpr):
    """Numbers of a head at `rows` and `columns`; 0 outside."""
    at = rows[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(pointer + at, mask=(rows[:, None] < limit) & (columns[None, :] < D), other=0.0)


@triton.jit
def forward_kernel(
    q, k, v, out, heads, q_rows, k_rows, q_batch, q_stride, k_batch, k_stride, v_batch, v_stride, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`DOT` is what products are computed in: the type of q, except in the interpreter, which cannot multiply bfloat16."""
    image, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    q += image * q_batch + head * D
    k += image * k_batch + head * D
    v += image * v_batch + head * D
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    first = tl.arange(0, D1)
    dtype = v.dtype.element_ty

    q1 = read(q, rows, q_stride, q_rows, first, D).to(DOT)
    best = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    sum1 = tl.zeros((BLOCK_Q, D1), tl.float32)
    if D2 > 0:
        second = D1 + tl.arange(0, D2)
        q2 = read(q, rows, q_stride, q_rows, second, D).to(DOT)
        sum2 = tl.zeros((BLOCK_Q, D2), tl.float32)

    for start in range(0, k_rows, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        scores = tl.dot(q1, tl.trans(read(k, keys, k_stride, k_rows, first, D).to(DOT)), input_precision="ieee")
        if D2 > 0:
            scores += tl.dot(q2, tl.trans(read(k, keys, k_stride, k_rows, second, D).to(DOT)), input_precision="ieee")
        # scaled here, not in q, which would be rounded once more
        scores = tl.where((keys < k_rows)[None, :], scores * scale, float("-inf"))
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


def tile(head_width: int) -> dict[str, int]:
    """Queries and keys that a program holds, and its warps. A wide head leaves room for fewer keys."""
    if head_width > 128:
        return {"BLOCK_Q": BLOCK_Q, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_Q": BLOCK_Q, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}


def ours_is_faster(batch: int, heads: int, rows: int) -> bool:
    """Whether the kernel is, against the best attention of PyTorch. On an H200 it was where all programs run at once (up to 128
    of them; cuDNN took 1.2 to 1.3 times as long), and cuDNN from 384 of them on (the kernel: 1.02 to 1.7 times; docs/kernels.md).
    Measured there alone; elsewhere this is a guess."""
    return batch * heads * triton.cdiv(rows, BLOCK_Q) <= AT_ONCE


def aligned(*tensors: Tensor) -> bool:
    """Whether Triton compiles the kernel as it does for all models of published sizes, for all of these tensors.

    Where it does not, ptxas 12.8 (of Triton 3.6) can make wrong code of it: three heads of 72 from one projection, whose
    values are 648 numbers apart, came out wrong on an H200, the first numbers of a row right and the last wrong. In the machine
    code the address of what the second product reads begins from a register that nothing wrote; tests/support/ahead.py looks
    for such. 12.9 does not do it."""
    return all(
        tensor.data_ptr() % ALIGNED == 0 and all(stride % ALIGNED == 0 for stride in tensor.stride()[:2]) for tensor in tensors
    )


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


def _launch(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    batch, rows, width = q.shape
    d = width // heads
    first, rest = parts_of(d, 16)
    out = torch.empty(batch, rows, width, dtype=q.dtype, device=q.device)
    launch(
        forward_kernel, (triton.cdiv(rows, BLOCK_Q), batch * heads),
        q, k, v, out, heads, rows, k.shape[1],
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), d**-0.5 * _LOG2_E,
        D=d, D1=first, D2=rest, DOT=tl.float32 if interpreted() else TYPES[q.dtype], **tile(d),
    )  # fmt: skip
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Whichever is faster, of those that are right."""
    if interpreted() or (ours_is_faster(len(q), heads, q.shape[1]) and aligned(q, k, v)):
        return _launch(q, k, v, heads)
    q, k, v = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (q, k, v))
    order = attention_order(q.device)
    if not order:
        return _rows_again(F.scaled_dot_product_attention(q, k, v))
    with sdpa_kernel(order, set_priority=True):
        return _rows_again(F.scaled_dot_product_attention(q, k, v))


def _rows_again(out: Tensor) -> Tensor:
    """(B, heads, N, d) to (B, N, heads d)."""
    return out.transpose(1, 2).flatten(2)


def _launch_cross(q: Tensor, k: Tensor, v: Tensor, heads: int, attend: Attend = _launch) -> Tensor:
    require("attention", heads=None if heads > 0 else f"is {heads}; wanted at least 1")
    require("attention", q=_rows(q, heads))
    require("attention", k=_rows(k, heads, like=q), v=_rows(v, heads, like=q))
    require("attention", v=None if v.shape == k.shape else f"has shape {tuple(v.shape)}; wanted {tuple(k.shape)}, that of k")
    return attend(q, k, v, heads)


def _launch_packed(
    qkv: Tensor, heads: int, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    attend: Attend = _launch,
) -> Tensor:  # fmt: skip
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
    if q_weight is not None or cos is not None:
        q, k = rotary._launch(qkv, heads, q_weight, k_weight, cos, sin)
    return attend(q, k, v, heads)


@torch.library.custom_op("clipdit::attention", mutates_args=(), device_types="cuda")
def cross(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """See `clipdit.model.ops.attention`."""
    return _launch_cross(q, k, v, heads, _attend)


@torch.library.custom_op("clipdit::qkv_attention", mutates_args=(), device_types="cuda")
def packed(
    qkv: Tensor, heads: int, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    """See `clipdit.model.ops.qkv_attention`."""
    return _launch_packed(qkv, heads, q_weight, k_weight, cos, sin, _attend)


def _plain_cross(q, k, v, heads):
    return plain.attention(q, k, v, heads=heads)


def _plain_packed(qkv, heads, q_weight, k_weight, cos, sin):
    rotary = None if cos is None else (cos, sin)
    return plain.qkv_attention(qkv, heads=heads, q_weight=q_weight, k_weight=k_weight, rotary=rotary)


cross.register_kernel("cpu")(on_cpu(_plain_cross, _launch_cross))
packed.register_kernel("cpu")(on_cpu(_plain_packed, _launch_packed))
cross.register_fake(lambda q, k, v, heads: q.new_empty(q.shape))
packed.register_fake(lambda qkv, *_: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3))
