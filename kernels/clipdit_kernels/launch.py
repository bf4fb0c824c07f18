"""What all launchers share: what a kernel takes, said in one line when it does not, and where it can run."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What tensors of numbers may be in."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""The same, as Triton calls them."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU. Decided by TRITON_INTERPRET when Triton is first imported."""
    return bool(knobs.runtime.interpret)


def architecture() -> int:
    """Of the GPU that kernels are compiled for: 90 is Hopper; 0 in the interpreter."""
    target = None if interpreted() else driver.active.get_current_target()
    return 0 if target is None else int(target.arch)


def why_not_here(device: torch.device, *, instead: str = "use the eager backend there") -> str | None:
    """Why no kernel can run on this device, in a line that ends in what to do; None when they can."""
    if device.type == "cuda":
        return "TRITON_INTERPRET is set, and an interpreted kernel cannot reach a GPU; unset it" if interpreted() else None
    if device.type == "cpu" and interpreted():
        return None
    return f"fused kernels run on NVIDIA GPUs, not on {device.type}; {instead}"


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel over a grid. `constants` are its compile-time ones, and num_warps and num_stages."""
    kernel[grid](*arguments, enable_fp_fusion=True, **constants)  # the default will change with Triton 3.10; a sum may be fused


class Unsupported(ValueError):
    """A fused kernel does not take these arguments. The plain operation does."""


def require(operation: str, **reasons: str | None) -> None:
    """Unsupported with the first reason that is one: `argument=None` or `argument="is ...; wanted ..."`."""
    for argument, reason in reasons.items():
        if reason is not None:
            raise Unsupported(f"{operation}: {argument} {reason}")


def require_no_gradient(operation: str, **tensors: Tensor | None) -> None:
    """Unsupported where a gradient would be lost."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            require(operation, **{name: "wants a gradient, which this kernel has not; use the plain operation"})


def rows_of(tensor: Tensor, *, like: Tensor | None = None) -> str | None:
    """Why a tensor is not (B, N, D) of numbers in rows that follow each other; None when it is."""
    if tensor.ndim != 3:
        return f"has shape {tuple(tensor.shape)}; wanted (B, N, D)"
    if tensor.dtype not in FLOATS:
        return f"is of {tensor.dtype}; wanted float32, bfloat16 or float16"
    if not tensor.numel():
        return f"is empty, {tuple(tensor.shape)}; wanted at least one row"
    if not tensor.is_contiguous():
        return f"has strides {tensor.stride()}; wanted contiguous rows. Call .contiguous()"
    if tensor.numel() >= 2**31:
        return f"has {tensor.numel():,} numbers; a kernel counts to 2,147,483,647. Use a smaller batch"
    if like is not None and tensor.shape != like.shape:
        return f"has shape {tuple(tensor.shape)}; wanted {tuple(like.shape)}"
    return of_device(tensor, like)


def per_image(tensor: Tensor | None, rows: Tensor) -> str | None:
    """Why a tensor is not one row of numbers for each image of `rows`, (B, 1, D), a view or not; None when it is."""
    if tensor is None:
        return None
    batch, _, width = rows.shape
    if tensor.shape != (batch, 1, width):
        return f"has shape {tuple(tensor.shape)}; wanted {(batch, 1, width)}, one row an image"
    if tensor.dtype not in FLOATS:
        return f"is of {tensor.dtype}; wanted float32, bfloat16 or float16"
    if tensor.stride(2) != 1:
        return f"has strides {tensor.stride()}; wanted neighbours in a row next to each other. Call .contiguous()"
    return of_device(tensor, rows)


def not_multiplied(dtype: torch.dtype) -> str | None:
    """Why a kernel does not multiply numbers of this type; None when it does. The interpreter multiplies all."""
    if dtype == torch.float32 and not interpreted():
        return "is of torch.float32; wanted bfloat16 or float16, which tensor cores multiply as they are. Use the plain operation"
    return None


def of_device(tensor: Tensor, other: Tensor | None) -> str | None:
    """Why two tensors cannot meet in a kernel; None when they can."""
    if other is not None and tensor.device != other.device:
        return f"is on {tensor.device}; wanted {other.device}, where the others are"
    return None


def parts_of(width: int, least: int = 1) -> tuple[int, int]:
    """The largest power of two in a width, and the power of two, `least` or more, that holds the rest; 0 is none."""
    first = 1 << (width.bit_length() - 1)
    return first, max(least, triton.next_power_of_2(width - first)) if width > first else 0


def warps_for(block: int) -> int:
    """Warps of a program that reads a row of `block` numbers: so few that every load of half precision stays 128 bits wide."""
    return max(1, min(8, block // 256))


Launcher = Callable[..., Any]


def on_cpu(plain: Launcher, launch: Launcher) -> Launcher:
    """What an operator does with tensors on a CPU: the plain operation; the kernel where it is interpreted."""
    return launch if interpreted() else plain
