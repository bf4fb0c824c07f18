"""Guidance and a row of the sampling table in one pass over the latents, with the row's constants read from the device: so that a
CUDA graph of all steps has one node for it, and no number of the table inside."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipdit.model import ops as plain
from clipdit_kernels.launch import FLOATS, launch, of_device, on_cpu, require

BLOCK = 1024


@triton.jit
def forward_kernel(
    x, memory, f, row, out_x, out_memory, out_given, numbers, guidance,
    GUIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    a, b, c, e = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 5)
    before = tl.load(x + at, mask=inside)
    answer = tl.load(f + at, mask=inside).to(tl.float32)
    if GUIDED:
        blank = tl.load(f + numbers + at, mask=inside).to(tl.float32)
        answer = blank + guidance * (answer - blank)
    after = a * before + b * answer + c * tl.load(memory + at, mask=inside)
    tl.store(out_x + at, after, mask=inside)
    tl.store(out_memory + at, before + e * answer, mask=inside)
    given = after.to(out_given.dtype.element_ty)
    tl.store(out_given + at, given, mask=inside)
    if GUIDED:
        tl.store(out_given + numbers + at, given, mask=inside)


def _launch(x: Tensor, memory: Tensor, f: Tensor, row: Tensor, guidance: float) -> tuple[Tensor, Tensor, Tensor]:
    copies = 1 if guidance == 1.0 else 2
    require(
        "guided_step",
        x=None if x.dtype == torch.float32 else f"is of {x.dtype}; wanted float32, in which latents are carried",
        memory=None if memory.dtype == torch.float32 else f"is of {memory.dtype}; wanted float32",
        f=None if f.dtype in FLOATS else f"is of {f.dtype}; wanted float32, bfloat16 or float16",
        row=None if row.shape == (6,) else f"has shape {tuple(row.shape)}; wanted (6,): time, a, b, c, d, e",
    )
    shapes = {"x": (x, x.shape), "memory": (memory, x.shape), "f": (f, (copies * len(x), *x.shape[1:]))}
    for name, (tensor, wanted) in shapes.items():
        wrong = f"has shape {tuple(tensor.shape)}; wanted {tuple(wanted)}" if tensor.shape != wanted else None
        empty = None if tensor.numel() else f"is empty, {tuple(tensor.shape)}; wanted at least one image"
        uneven = None if tensor.is_contiguous() else f"has strides {tensor.stride()}; wanted a contiguous tensor"
        require("guided_step", **{name: empty or wrong or uneven or of_device(tensor, x)})
    fine = row.dtype == torch.float32 and row.stride(0) == 1
    require("guided_step", row=of_device(row, x) or (None if fine else f"is of {row.dtype}; wanted float32, contiguous"))
    outputs = torch.empty_like(x), torch.empty_like(x), torch.empty_like(f)
    launch(
        forward_kernel, (triton.cdiv(x.numel(), BLOCK),), x, memory, f, row, *outputs, x.numel(), float(guidance),
        GUIDED=copies == 2, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return outputs


@torch.library.custom_op("clipdit::guided_step", mutates_args=(), device_types="cuda")
def step(x: Tensor, memory: Tensor, f: Tensor, row: Tensor, guidance: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `clipdit.model.ops.guided_step`."""
    return _launch(x, memory, f, row, guidance)


def _plain(x, memory, f, row, guidance):
    return plain.guided_step(x, memory, f, row, guidance=guidance)


step.register_kernel("cpu")(on_cpu(_plain, _launch))
step.register_fake(lambda x, memory, f, row, guidance: (torch.empty_like(x), torch.empty_like(x), torch.empty_like(f)))
