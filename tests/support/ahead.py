"""Kernels compiled for GPUs that are not there: what an operation would launch, through Triton and ptxas to machine code.

    python ahead.py CASES...   prints, as JSON, what each case compiled to for each architecture
    python ahead.py > ../kernels/resources.json    writes the golden file anew

The launchers themselves are called, on fake tensors; a driver that only knows its target takes the place of CUDA's, and a launch
stops once it is compiled. In a process of its own, without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PRODUCTS = ("HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "HMMA", "IMMA", "QMMA", "DMMA")
"""Matrix instructions, as machine code names them."""


class Argument(MockTensor):
    """A fake tensor as Triton specialises for it: its type, and whether its first number lies at a multiple of 16 bytes."""

    def __init__(self, tensor: torch.Tensor):
        super().__init__(tensor.dtype, list(tensor.shape))
        address = tensor.storage_offset() * tensor.element_size()
        self.data_ptr = lambda: address


def compile_only(run: Callable, seen: list[Any]) -> Callable:
    """JITFunction.run that compiles what it is given, notes the result, and launches nothing."""

    def instead(self, *args, grid, warmup, **kwargs):
        args = [Argument(arg) if isinstance(arg, FakeTensor) else arg for arg in args]
        seen.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    return instead


def compiled(case: Callable[[], None], capability: int) -> list[Any]:
    """The kernels that a call on fake tensors launches on a GPU of this compute capability (90: Hopper)."""
    target = GPUTarget("cuda", capability, 32)
    absent = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: capability, get_current_stream=lambda device: 0
    )
    driver.set_active(absent)  # pyright: ignore[reportArgumentType]  (only its target is asked for)
    seen: list[Any] = []
    run = JITFunction.run
    JITFunction.run = compile_only(run, seen)
    try:
        with FakeTensorMode():
            case()
    finally:
        JITFunction.run = run
    return seen


def read_unwritten(code: str) -> list[str]:
    """Instructions, as nvdisasm prints them, that read a uniform register which no instruction before them writes.

    The address of what Hopper's products read lies in such registers. ptxas 12.8, which Triton 3.6 brings, once began one from a
    register that nothing had written: right in the interpreter and in PTX, wrong on the GPU. 12.9 does not."""
    written: set[int] = set()
    found = []
    for line in code.splitlines():
        instruction = re.match(r"\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s+(.*?)\s*;", line)
        if instruction is None:
            continue
        name, operands = instruction.groups()
        result = re.match(r"UR(\d+),", operands)
        # a product whose first factor lies in registers reads only half of its four
        sources = re.sub(r"gdesc\[UR\d+\]", "", operands[result.end() :] if result else operands)
        if any(int(number) not in written for number in re.findall(r"\bUR(\d+)\b", sources)):
            found.append(f"{name} {operands}")
        if result:
            first, parts = int(result[1]), set(name.split("."))
            written.update(range(first, first + (4 if "128" in parts else 2 if parts & {"64", "WIDE"} else 1)))
    return found


def ledger(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel takes of a GPU, and what it computes with."""
    with TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        code = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    instructions = Counter(re.findall(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)\s", code, re.MULTILINE))
    loads: Counter[str] = Counter()
    for name, count in instructions.items():
        if name.startswith(("LDG.", "LDGSTS.")):  # the second into shared memory, without waiting
            loads[next((bits for bits in ("128", "64", "U8", "S8", "U16", "S16") if f".{bits}" in f"{name}."), "32")] += count
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": sum(count for name, count in instructions.items() if name.startswith(("STL", "LDL"))),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "loads": dict(sorted(loads.items())),
        "products": sorted({p for p in PRODUCTS for name in instructions if name.split(".")[0] == p}),
        "unwritten": read_unwritten(code),
    }


if __name__ == "__main__":
    from kernel_cases import CASES, capabilities

    found: dict[str, dict[str, Any]] = {}
    for name in sys.argv[1:] or CASES:
        found[name] = {}
        for capability in capabilities(name):
            kernels = compiled(CASES[name], capability)
            assert len(kernels) == 1, f"{name} launches {len(kernels)} kernels; wanted one"
            found[name][f"sm_{capability}"] = ledger(kernels[0])
    rows = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(made)}" for name, made in found.items())
    print(f'{{"triton": "{triton.__version__}", "cases": {{\n  {rows}\n}}}}')
