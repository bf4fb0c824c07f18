"""How far a fused operation may be from the plain one in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOORS = {
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 3e-3,
}
"""Relative to the largest number: what rounding the result alone may cost, and a little."""


def doubles(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


Tensors = Tensor | Sequence[Tensor]


def close(got: Tensors, wanted: Tensors, *, like: Tensors | None = None) -> bool:
    """Whether each of `got` is finite, and its error from `wanted` (float64) within the floor of its type, plus 1.25 times that
    of `like`, the plain operation in the same type."""
    if isinstance(got, Tensor):
        got, wanted, like = [got], [wanted], None if like is None else [like]
    likes = [None] * len(got) if like is None else like
    for one, exact, other in zip(got, wanted, likes, strict=True):
        size = exact.abs().max().clamp_min(1e-30)
        error = (one.double() - exact).abs().max() / size
        allowed = FLOORS[one.dtype] + (0.0 if other is None else 1.25 * float((other.double() - exact).abs().max() / size))
        if one.shape != exact.shape or not one.isfinite().all() or error > allowed:
            print(f"error {error:.2e}, allowed {allowed:.2e}, shapes {tuple(one.shape)} {tuple(exact.shape)}")
            return False
    return True
