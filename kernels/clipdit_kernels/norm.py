"""The end of one branch and the start of the next in one pass over the tokens:

    residual + gate * (branch)  ->  LayerNorm or RMSNorm without parameters  ->  * (1 + scale) + shift

One program a row: it is read once, held in registers in float32, and written once for each output. A row that is no power of two
wide is held in two parts, the largest power of two in it and the rest: 1152 are 1024 + 128, where 2048 would leave almost half of
the threads idle. The variance is that of the differences from the mean, not a difference of squares, which loses everything where
the mean is large.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipdit.model import fp8_ops as plain_fp8
from clipdit.model import int8_ops as plain_int8
from clipdit.model import ops as plain
from clipdit.model.fp8_ops import LARGEST
from clipdit.model.int8_ops import GROUP, LEAST
from clipdit_kernels.launch import launch, on_cpu, parts_of, per_image, require, rows_of, warps_for

WIDEST = 8192
"""Numbers of a row that one program holds in registers."""
BACKWARD_ROWS = 16
"""Rows of an image whose gradients of shift, scale and gate one program adds up."""


@triton.jit
def updated(
    residual, branch, gate, out_residual, at, gate_at, columns, inside, HAS_BRANCH: tl.constexpr, HAS_GATE: tl.constexpr
):  # fmt: skip
    """The new residual, which is stored. What is normalised is what the next branch will find there: rounded as it is stored."""
    x = tl.load(residual + at + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        y = tl.load(branch + at + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            y *= tl.load(gate + gate_at + columns, mask=inside, other=0.0).to(tl.float32)
        stored = (x + y).to(out_residual.dtype.element_ty)
        tl.store(out_residual + at + columns, stored, mask=inside)
        x = stored.to(tl.float32)
    return x


@triton.jit
def modulated(x, shift, scale, shift_at, scale_at, columns, inside):
    factor = tl.load(scale + scale_at + columns, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + shift_at + columns, mask=inside, other=0.0).to(tl.float32)
    return x * (1.0 + factor) + offset


@triton.jit
def store_groups(
    out, out_scales, x, columns, inside, first, D: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, LEAST: tl.constexpr
):  # fmt: skip
    """SIZE numbers in 8 bits, with the scales of their groups, of which the first is the row's `first`."""
    grouped = tl.reshape(x, (SIZE // GROUP, GROUP))
    largest = tl.maximum(tl.max(tl.abs(grouped), axis=1), LEAST)
    group = first + tl.arange(0, SIZE // GROUP)
    tl.store(out_scales + group, largest / 127.0, mask=group < D // GROUP)
    numbers = tl.floor(grouped * (127.0 / largest)[:, None] + 0.5).to(tl.int8)
    tl.store(out + columns, tl.reshape(numbers, (SIZE,)), mask=inside)


@triton.jit
def forward_kernel(
    residual, branch, gate, shift, scale, out_residual, out_normed, out_scales,
    rows_per_image, gate_stride, shift_stride, scale_stride,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_GATE: tl.constexpr, HAS_MODULATION: tl.constexpr,
    GROUP: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """GROUP numbers of the norm share a scale and leave as 8-bit integers; with LARGEST the whole row shares one and leaves as
    8-bit floats, of which that is the largest; with 0 and 0 they leave as they are."""
    image = tl.program_id(0) // rows_per_image
    at = tl.program_id(0).to(tl.int64) * D
    gate_at, shift_at, scale_at = image * gate_stride, image * shift_stride, image * scale_stride
    first = tl.arange(0, D1)
    x1 = updated(residual, branch, gate, out_residual, at, gate_at, first, first < D, HAS_BRANCH, HAS_GATE)
    total = tl.sum(x1, axis=0)
    if D2 > 0:
        second = D1 + tl.arange(0, D2)
        x2 = updated(residual, branch, gate, out_residual, at, gate_at, second, second < D, HAS_BRANCH, HAS_GATE)
        total += tl.sum(x2, axis=0)
    if not RMS:
        mean = tl.div_rn(total, D + 0.0)  # exactly: a row of equal numbers has to come out as zeros
        x1 -= mean
        if D2 > 0:
            x2 = tl.where(second < D, x2 - mean, 0.0)
    squares = tl.sum(x1 * x1, axis=0)
    if D2 > 0:
        squares += tl.sum(x2 * x2, axis=0)  # pyright: ignore[reportOperatorIssue]  (D2 does not change)
    inverse = tl.rsqrt(squares / D + EPS)
    x1 *= inverse
    if HAS_MODULATION:
        x1 = modulated(x1, shift, scale, shift_at, scale_at, first, first < D)
    if D2 > 0:
        x2 *= inverse
        if HAS_MODULATION:
            x2 = modulated(x2, shift, scale, shift_at, scale_at, second, second < D)
    out_normed += at
    if GROUP > 0:
        out_scales += tl.program_id(0).to(tl.int64) * (D // GROUP)
        store_groups(out_normed, out_scales, x1, first, first < D, 0, D, D1, GROUP, LEAST)
        if D2 > 0:
            store_groups(out_normed, out_scales, x2, second, second < D, D1 // GROUP, D, D2, GROUP, LEAST)
    else:
        if LARGEST > 0:
            largest = tl.maximum(tl.max(tl.abs(x1), axis=0), LEAST)
            if D2 > 0:
                largest = tl.maximum(tl.max(tl.abs(x2), axis=0), largest)
                x2 *= LARGEST / largest
            x1 *= LARGEST / largest
            tl.store(out_scales + tl.program_id(0), largest / LARGEST)
        tl.store(out_normed + first, x1.to(out_normed.dtype.element_ty), mask=first < D)
        if D2 > 0:
            tl.store(out_normed + second, x2.to(out_normed.dtype.element_ty), mask=second < D)


@triton.jit
def backward_kernel(
    updated, branch, gate, scale, grad_residual, grad_normed,
    out_residual, out_branch, out_gate, out_shift, out_scale,
    rows_per_image, chunks, gate_stride, scale_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_GATE: tl.constexpr, HAS_MODULATION: tl.constexpr, HAS_GRAD_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """`updated` is the new residual: what was normalised. A program does ROWS rows of one image, and leaves the sums of their
    gradients of gate, shift and scale, (B, chunks, D), for a sum outside: in one order, so that twice is the same."""
    image, chunk = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    factor = tl.full((BLOCK,), 1.0, tl.float32)
    weight = tl.full((BLOCK,), 1.0, tl.float32)
    if HAS_MODULATION:
        factor += tl.load(scale + image * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        weight = tl.load(gate + image * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    sum_gate = tl.zeros((BLOCK,), tl.float32)
    sum_shift = tl.zeros((BLOCK,), tl.float32)
    sum_scale = tl.zeros((BLOCK,), tl.float32)
    for row in range(chunk * ROWS, tl.minimum((chunk + 1) * ROWS, rows_per_image)):
        at = (image * rows_per_image + row).to(tl.int64) * D + columns
        x = tl.load(updated + at, mask=inside, other=0.0).to(tl.float32)
        centred = x if RMS else tl.where(inside, x - tl.div_rn(tl.sum(x, axis=0), D + 0.0), 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, axis=0) / D + EPS)
        normed = centred * inverse
        grad = tl.load(grad_normed + at, mask=inside, other=0.0).to(tl.float32)
        sum_shift += grad
        sum_scale += grad * normed
        grad *= factor
        inner = grad - normed * (tl.sum(grad * normed, axis=0) / D)
        if not RMS:
            inner -= tl.sum(grad, axis=0) / D
        total = inner * inverse
        if HAS_GRAD_RESIDUAL:
            total += tl.load(grad_residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_residual + at, total.to(out_residual.dtype.element_ty), mask=inside)
        if HAS_BRANCH:
            tl.store(out_branch + at, (total * weight).to(out_branch.dtype.element_ty), mask=inside)
            if HAS_GATE:
                sum_gate += total * tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    at = (image * chunks + chunk).to(tl.int64) * D + columns
    if HAS_GATE:
        tl.store(out_gate + at, sum_gate, mask=inside)
    if HAS_MODULATION:
        tl.store(out_shift + at, sum_shift, mask=inside)
        tl.store(out_scale + at, sum_scale, mask=inside)


def _launch(
    residual: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    norm: str, eps: float, group: int = 0, floats: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(new residual, or the old one where there is no branch; modulated norm; its scales). `group` numbers of the norm share a
    scale and are 8-bit integers; with `floats` the row does and they are e4m3; else there are no scales."""
    batch, rows, width = residual.shape
    dtype = torch.int8 if group else torch.float8_e4m3fn if floats else residual.dtype
    normed = torch.empty_like(residual, dtype=dtype)
    scales = torch.empty(batch, rows, width // group if group else int(floats), dtype=torch.float32, device=residual.device)
    updated = residual if branch is None else torch.empty_like(residual)
    first, rest = parts_of(width)
    launch(
        forward_kernel, (batch * rows,),
        residual, branch, gate, shift, scale, updated, normed, scales, rows,
        *(0 if tensor is None else tensor.stride(0) for tensor in (gate, shift, scale)),
        D=width, D1=first, D2=rest, EPS=eps, RMS=norm == "rms", GROUP=group, LARGEST=LARGEST if floats else 0, LEAST=LEAST,
        HAS_BRANCH=branch is not None, HAS_GATE=gate is not None, HAS_MODULATION=scale is not None,
        num_warps=max(1, first // 1024),
    )  # fmt: skip
    return updated, normed, scales


def _check(
    operation: str,
    residual: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    norm: str,
    called: str = "residual",
) -> None:
    width = residual.shape[-1]
    require(
        operation, **{called: rows_of(residual) or (None if width <= WIDEST else f"has rows of {width}; wanted at most {WIDEST}")}
    )
    require(
        operation,
        norm=None if norm in ("layer", "rms") else f"is {norm!r}; wanted layer or rms",
        branch=None if branch is None else rows_of(branch, like=residual),
        gate=per_image(gate, residual),
        shift=per_image(shift, residual) if (shift is None) == (scale is None) else "and scale: one is None; wanted both or none",
        scale=per_image(scale, residual),
    )


def _launch_backward(
    updated: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor | None,
    grad_residual: Tensor | None, grad_normed: Tensor, norm: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, rows, width = updated.shape
    chunks, block = triton.cdiv(rows, BACKWARD_ROWS), triton.next_power_of_2(width)

    def sums(wanted: bool) -> Tensor | None:
        return torch.empty(batch, chunks, width, dtype=torch.float32, device=updated.device) if wanted else None

    to_residual, to_branch = torch.empty_like(updated), None if branch is None else torch.empty_like(branch)
    to_gate, to_shift, to_scale = sums(gate is not None), sums(scale is not None), sums(scale is not None)
    launch(
        backward_kernel, (batch, chunks),
        updated, branch, gate, scale, grad_residual, grad_normed, to_residual, to_branch, to_gate, to_shift, to_scale,
        rows, chunks, *(0 if tensor is None else tensor.stride(0) for tensor in (gate, scale)),
        D=width, BLOCK=block, ROWS=BACKWARD_ROWS, EPS=eps, RMS=norm == "rms", HAS_BRANCH=branch is not None,
        HAS_GATE=gate is not None, HAS_MODULATION=scale is not None, HAS_GRAD_RESIDUAL=grad_residual is not None,
        num_warps=warps_for(block),
    )  # fmt: skip
    summed = (None if made is None else made.sum(1, keepdim=True) for made in (to_gate, to_shift, to_scale))
    return _all_there(to_residual, to_branch, *summed)


def _launch_both(
    residual: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    _check("gate_residual_norm_modulate", residual, branch, gate, shift, scale, norm)
    return _launch(residual, branch, gate, shift, scale, norm, eps)[:2]


def _launch_norm(x: Tensor, shift: Tensor | None, scale: Tensor | None, norm: str, eps: float) -> Tensor:
    _check("norm_modulate", x, None, None, shift, scale, norm, called="x")
    return _launch(x, None, None, shift, scale, norm, eps)[1]


def _launch_both_int8(
    residual: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, norm: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check("gate_residual_norm_modulate", residual, branch, gate, shift, scale, norm)
    require("gate_residual_norm_modulate", residual=_uneven(residual))
    return _launch(residual, branch, gate, shift, scale, norm, eps, group=GROUP)


def _launch_norm_int8(x: Tensor, shift: Tensor | None, scale: Tensor | None, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    _check("norm_modulate", x, None, None, shift, scale, norm, called="x")
    require("norm_modulate", x=_uneven(x))
    return _launch(x, None, None, shift, scale, norm, eps, group=GROUP)[1:]


def _launch_both_fp8(
    residual: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, norm: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check("gate_residual_norm_modulate", residual, branch, gate, shift, scale, norm)
    return _launch(residual, branch, gate, shift, scale, norm, eps, floats=True)


def _launch_norm_fp8(x: Tensor, shift: Tensor | None, scale: Tensor | None, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    _check("norm_modulate", x, None, None, shift, scale, norm, called="x")
    return _launch(x, None, None, shift, scale, norm, eps, floats=True)[1:]


def _uneven(x: Tensor) -> str | None:
    return f"has rows of {x.shape[-1]}; wanted a multiple of {GROUP}, which share a scale" if x.shape[-1] % GROUP else None


@torch.library.custom_op("clipdit::gate_residual_norm_modulate", mutates_args=(), device_types="cuda")
def both(
    residual: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    """See `clipdit.model.ops.gate_residual_norm_modulate`."""
    return _launch_both(residual, branch, gate, shift, scale, norm, eps)


@torch.library.custom_op("clipdit::norm_modulate", mutates_args=(), device_types="cuda")
def alone(x: Tensor, shift: Tensor | None, scale: Tensor | None, norm: str, eps: float) -> Tensor:
    """See `clipdit.model.ops.norm_modulate`."""
    return _launch_norm(x, shift, scale, norm, eps)


@torch.library.custom_op("clipdit::gate_residual_norm_modulate_int8", mutates_args=(), device_types="cuda")
def both_int8(
    residual: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, norm: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `clipdit.model.int8_ops.gate_residual_norm_modulate`: (new residual, numbers, scales)."""
    return _launch_both_int8(residual, branch, gate, shift, scale, norm, eps)


@torch.library.custom_op("clipdit::norm_modulate_int8", mutates_args=(), device_types="cuda")
def alone_int8(x: Tensor, shift: Tensor | None, scale: Tensor | None, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """See `clipdit.model.int8_ops.norm_modulate`: (numbers, scales)."""
    return _launch_norm_int8(x, shift, scale, norm, eps)


@torch.library.custom_op("clipdit::gate_residual_norm_modulate_fp8", mutates_args=(), device_types="cuda")
def both_fp8(
    residual: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, norm: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `clipdit.model.fp8_ops.gate_residual_norm_modulate`: (new residual, numbers, scales)."""
    return _launch_both_fp8(residual, branch, gate, shift, scale, norm, eps)


@torch.library.custom_op("clipdit::norm_modulate_fp8", mutates_args=(), device_types="cuda")
def alone_fp8(x: Tensor, shift: Tensor | None, scale: Tensor | None, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """See `clipdit.model.fp8_ops.norm_modulate`: (numbers, scales)."""
    return _launch_norm_fp8(x, shift, scale, norm, eps)


@torch.library.custom_op("clipdit::gate_residual_norm_modulate_backward", mutates_args=(), device_types="cuda")
def backward(
    updated: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    grad_residual: Tensor | None,
    grad_normed: Tensor,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual, branch, gate, shift and scale; an empty tensor for what was None."""
    return _launch_backward(updated, branch, gate, scale, grad_residual, grad_normed, norm, eps)


def _plain_both(residual, branch, gate, shift, scale, norm, eps):
    return plain.gate_residual_norm_modulate(residual, branch, gate, shift, scale, norm=norm, eps=eps)


def _plain_norm(x, shift, scale, norm, eps):
    return plain.norm_modulate(x, shift, scale, norm=norm, eps=eps)


def _plain_both_int8(residual, branch, gate, shift, scale, norm, eps):
    residual, rows = plain_int8.gate_residual_norm_modulate(residual, branch, gate, shift, scale, norm=norm, eps=eps)
    return residual, *rows


def _plain_norm_int8(x, shift, scale, norm, eps):
    return tuple(plain_int8.norm_modulate(x, shift, scale, norm=norm, eps=eps))


def _plain_both_fp8(residual, branch, gate, shift, scale, norm, eps):
    residual, rows = plain_fp8.gate_residual_norm_modulate(residual, branch, gate, shift, scale, norm=norm, eps=eps)
    return residual, *rows


def _plain_norm_fp8(x, shift, scale, norm, eps):
    return tuple(plain_fp8.norm_modulate(x, shift, scale, norm=norm, eps=eps))


def _fake_fp8(x):
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def _fake_int8(x):
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(*x.shape[:-1], x.shape[-1] // GROUP, dtype=torch.float32)


def _plain_backward(updated, branch, gate, scale, grad_residual, grad_normed, norm, eps):
    x, grad = updated.float(), grad_normed.float()
    centred = x if norm == "rms" else x - x.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = centred * inverse
    inner = grad if scale is None else grad * (1 + scale.float())
    total = inner - normed * (inner * normed).mean(-1, keepdim=True)
    total = inverse * (total if norm == "rms" else total - inner.mean(-1, keepdim=True))
    total = total if grad_residual is None else total + grad_residual.float()
    gated = total if gate is None else total * gate.float()
    to_branch = None if branch is None else gated.to(branch.dtype, copy=True)
    to_gate = None if gate is None or branch is None else (total * branch.float()).sum(1, keepdim=True)
    to_shift, to_scale = (None, None) if scale is None else (grad.sum(1, keepdim=True), (grad * normed).sum(1, keepdim=True))
    return _all_there(total.to(updated.dtype, copy=True), to_branch, to_gate, to_shift, to_scale)


def _all_there(first: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An operator returns tensors: an empty one for what was None."""
    branch, gate, shift, scale = (first.new_empty(0) if grad is None else grad for grad in others)
    return first, branch, gate, shift, scale


both.register_kernel("cpu")(on_cpu(_plain_both, _launch_both))
alone.register_kernel("cpu")(on_cpu(_plain_norm, _launch_norm))
both_int8.register_kernel("cpu")(on_cpu(_plain_both_int8, _launch_both_int8))
alone_int8.register_kernel("cpu")(on_cpu(_plain_norm_int8, _launch_norm_int8))
both_fp8.register_kernel("cpu")(on_cpu(_plain_both_fp8, _launch_both_fp8))
alone_fp8.register_kernel("cpu")(on_cpu(_plain_norm_fp8, _launch_norm_fp8))
both_fp8.register_fake(lambda residual, *_: (torch.empty_like(residual), *_fake_fp8(residual)))
alone_fp8.register_fake(lambda x, *_: _fake_fp8(x))
both_int8.register_fake(lambda residual, *_: (torch.empty_like(residual), *_fake_int8(residual)))
alone_int8.register_fake(lambda x, *_: _fake_int8(x))
both.register_fake(lambda residual, *_: (torch.empty_like(residual), torch.empty_like(residual)))
alone.register_fake(lambda x, *_: torch.empty_like(x))
backward.register_kernel("cpu")(on_cpu(_plain_backward, _launch_backward))


@backward.register_fake
def _(updated, branch, gate, scale, grad_residual, grad_normed, norm, eps):
    def sums(tensor):
        return None if tensor is None else torch.empty_like(tensor, dtype=torch.float32, memory_format=torch.contiguous_format)

    return _all_there(
        torch.empty_like(updated), None if branch is None else torch.empty_like(branch), sums(gate), sums(scale), sums(scale)
    )


def _differentiate_both(ctx, grad_residual, grad_normed):
    updated, branch, gate, shift, scale = ctx.saved_tensors
    grads = backward(updated, branch, gate, scale, grad_residual.contiguous(), grad_normed.contiguous(), ctx.norm, ctx.eps)
    return *_as_given(grads, (updated, branch, gate, shift, scale)), None, None


def _differentiate_norm(ctx, grad_normed):
    x, _, _, shift, scale = ctx.saved_tensors
    grads = backward(x, None, None, scale, None, grad_normed.contiguous(), ctx.norm, ctx.eps)
    to_x, _, _, to_shift, to_scale = _as_given(grads, (x, None, None, shift, scale))
    return to_x, to_shift, to_scale, None, None


def _as_given(grads, tensors):
    """None for what was None, and the types of what was given."""
    return tuple(None if tensor is None else grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors, strict=True))


def _keep_both(ctx, inputs, output):
    _, branch, gate, shift, scale, ctx.norm, ctx.eps = inputs
    ctx.save_for_backward(output[0], branch, gate, shift, scale)


def _keep_norm(ctx, inputs, output):
    x, shift, scale, ctx.norm, ctx.eps = inputs
    ctx.save_for_backward(x, None, None, shift, scale)


both.register_autograd(_differentiate_both, setup_context=_keep_both)
alone.register_autograd(_differentiate_norm, setup_context=_keep_norm)
