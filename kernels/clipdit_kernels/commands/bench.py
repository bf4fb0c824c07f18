"""`clipdit bench kernels` and `clipdit bench sampling`: how fast the fused kernels are on the GPU at hand."""

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Type = Literal["bf16", "fp16"]


def kernels(
    *,
    out: Path | None = None,
    operations: tuple[str, ...] = (),
    sizes: tuple[str, ...] = ("S", "B", "XL"),
    tokens: tuple[int, ...] = (256, 1024),
    images: tuple[int, ...] = (1, 8, 64),
    dtype: Type = "bf16",
    seconds: float = 0.5,
    json: bool = False,
) -> int:
    """Every fused operation against named peers, on the GPU at hand; without --out, the last numbers that came with the package.

    Each is a CUDA graph of cold calls, and they take turns. Errors are from float64. Written after each case; a run that was cut
    off goes on where it was.

    Args:
        out: where the numbers go, a .json file; a plot comes beside it.
        operations: which; all if not given.
        sizes: of the model, as in DiT-XL: its width and heads.
        tokens: of an image.
        images: in a batch; guidance makes two sequences of each.
        dtype: of tensors that are not in 8 bits.
        seconds: for all rivals of a case together.
        json: print the record as JSON; each kept one is a line.
    """
    if out is None:
        return _show("kernels", json)
    from clipdit_kernels.benchmark import operations as measured
    from clipdit_kernels.benchmark.cases import OPERATIONS, cases

    _check(out, (*tokens, *images), seconds)
    chosen = list(cases(operations or tuple(OPERATIONS), sizes, tokens, images, _type(dtype)))
    return _finish(measured.measure(chosen, _gpu(), out=out, seconds=seconds), out, json)


def sampling(
    *,
    out: Path | None = None,
    sizes: tuple[str, ...] = ("B", "XL"),
    tokens: tuple[int, ...] = (256, 1024),
    images: tuple[int, ...] = (1, 8, 64),
    variants: tuple[str, ...] = (),
    conditioning: Literal["clip", "concat", "both"] = "both",
    steps: int = 10,
    guidance: float = 4.0,
    dtype: Type = "bf16",
    seconds: float = 3.0,
    json: bool = False,
) -> int:
    """Whole sampling loops on the GPU at hand, eager to fused; without --out, the last numbers that came with the package.

    Networks of published sizes with random weights; errors are from float32. Written after each shape; a run that was cut off
    goes on where it was. For a checkpoint of yours, and for pictures: `clipdit bench`.

    Args:
        out: where the numbers go, a .json file; a plot comes beside it.
        sizes: of the model, as in DiT-XL.
        tokens: of an image: 256 are 256 x 256 px with a VAE of 8 pixels a cell and patches of 2.
        images: in a batch; guidance makes two sequences of each.
        variants: ways to run the loop; if not given all but compile-tuned-graph, which compiles for minutes.
        conditioning: what the network reads of the source.
        steps: of the solver.
        guidance: 1 is none.
        dtype: of the weights.
        seconds: for all ways together.
        json: print the record as JSON; each kept one is a line.
    """
    if out is None:
        return _show("sampling", json)
    from clipdit_kernels.benchmark import sampling as measured
    from clipdit_kernels.benchmark.cases import Shape

    _check(out, (*tokens, *images, steps), seconds)
    if unknown := [size for size in sizes if size not in measured.SIZES]:
        raise ValueError(f"there is no {unknown[0]}; there are {', '.join(measured.SIZES)}")
    if odd := [count for count in tokens if round(count**0.5) ** 2 != count]:
        raise ValueError(f"tokens is {odd[0]}; wanted a square, such as 256 or 1024")
    shapes = [Shape(size=size, tokens=count, images=batch) for size in sizes for count in tokens for batch in images]
    record = measured.measure(
        shapes,
        _gpu(),
        dtype=_type(dtype),
        conditioning=conditioning,
        steps=steps,
        guidance=guidance,
        variants=variants or measured.USUAL,
        out=out,
        seconds=seconds,
    )
    return _finish(record, out, json)


def _check(out: Path, counts: tuple[int, ...], seconds: float) -> None:
    if out.suffix != ".json":
        raise ValueError(f"{out} is no .json file; give a file for the numbers")
    if min(counts) < 1 or seconds <= 0:
        raise ValueError(f"the least of tokens, images and steps is {min(counts)}, seconds is {seconds:g}; wanted more than 0")


def _type(name: Type) -> "torch.dtype":
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _gpu() -> "torch.device":
    """ValueError where kernels cannot be measured."""
    import torch

    from clipdit.torch_backend import best_device
    from clipdit_kernels.launch import why_not_here

    device = best_device()
    last = "without --out you see the last numbers"
    reason = why_not_here(torch.device("cuda"), instead=last) or why_not_here(device, instead=last)
    if reason is not None:
        raise ValueError(f"there is nothing to measure here: {reason}")
    return device


def _show(kind: str, json: bool) -> int:
    from clipdit.cli import DONE
    from clipdit_kernels.benchmark.ledger import kept
    from clipdit_kernels.benchmark.report import heading, left_out, table

    records = kept(kind)
    if json:
        for record in records or [None]:
            print(json_module.dumps(record))
    elif not records:
        print(f"no GPU has measured these kernels yet. On one: clipdit bench {kind} --out {kind}.json")
    else:
        texts = ["\n".join(filter(None, [heading(record), "", table(record), left_out(record)])) for record in records]
        print("\n\n".join(texts))
    return DONE


def _finish(record: dict, out: Path, json: bool) -> int:
    from clipdit.cli import DONE
    from clipdit.files import write_atomically
    from clipdit_kernels.benchmark.report import heading, left_out, plot, table

    write_atomically(out.with_suffix(".png"), plot(record))
    if json:
        print(json_module.dumps(record))
    else:
        print("\n".join(filter(None, [heading(record), "", table(record), left_out(record)])))
        print(f"wrote {out} and {out.with_suffix('.png').name}")
    return DONE
