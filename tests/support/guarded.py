"""Tensors for kernels to be tested with: NaN before, behind and between what a kernel may read, and what it must not write.

A kernel that reads beyond its tensor finds NaN, which spreads into its result; one that writes there is found by `untouched`."""

import os

import torch
from torch import Tensor

DEVICE = torch.device(os.environ.get("CLIPDIT_TEST_DEVICE", "cpu"))
MULTIPLIED = [torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32, torch.float16, torch.bfloat16]
"""What kernels multiply; float32 in the interpreter alone."""
FINEST = MULTIPLIED[0]
GUARD = 4096
"""Numbers of NaN on either side."""


class Guarded:
    """Makes tensors that lie in NaN, and remembers them."""

    def __init__(self, seed: int = 0):
        self._generator = torch.Generator().manual_seed(seed)
        self._made: list[tuple[Tensor, Tensor]] = []  # (all of the memory, as it was; NaN where nobody may write)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return self.put(torch.randn(shape, generator=self._generator) * std + mean, dtype)

    def put(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of `values` amid NaN (of integers: amid their largest)."""
        dtype = dtype or values.dtype
        bad = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
        memory = torch.full((values.numel() + 2 * GUARD,), bad, dtype=dtype, device=DEVICE)
        tensor = memory[GUARD : GUARD + values.numel()].view(values.shape)
        tensor.copy_(values)
        self._made.append((memory, memory.clone()))
        return tensor

    def rows(self, batch: int, width: int, parts: int, *, dtype: torch.dtype = torch.float32, std: float = 1.0) -> list[Tensor]:
        """`parts` tensors (B, 1, D), each a view into one (B, parts, D), as modulation is."""
        whole = self.randn(batch, parts, width, dtype=dtype, std=std)
        return list(whole.split(1, dim=1))

    def untouched(self) -> bool:
        """Whether all that was made is bit for bit as it was, NaN included."""
        return all(torch.equal(now.view(torch.uint8), before.view(torch.uint8)) for now, before in self._made)
