"""Measures the fused operations against their peers, one at a time: `clipdit bench kernels`."""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipdit.measuring import Spread
from clipdit_kernels.benchmark import ceilings, ledger
from clipdit_kernels.benchmark.cases import OURS, Case, Inputs, Rival
from clipdit_kernels.benchmark.timing import Outputs, Recorded, in_turns_us, record, sets_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A rival in a case."""

    us: Spread
    """Microseconds of a call."""
    error: float | None
    """Largest difference from float64, over the largest number; None when a result is missing or no number."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What was measured of a case."""

    operation: str
    size: str
    tokens: int
    images: int
    dtype: str
    bytes_moved: int
    flops: int
    factors: str
    """What is multiplied; names the ceiling."""
    floor_us: float
    rivals: dict[str, Timed]
    left_out: dict[str, str]
    """Peers that did not run, and why."""


def measure(
    chosen: Iterable[Case],
    device: torch.device,
    *,
    out: Path | None = None,
    seconds: float = 0.5,
    side: int = 8192,
    on_case: Callable[[Entry], None] | None = None,
) -> ledger.Record:
    """Time the cases, and write the record to `out` after each. What `out` holds already, of the same kernels on the same
    machine, is kept and not measured again. `side`: see `ceilings.measure`.

    A peer that cannot run is left out with its reason; ours must run."""
    protocol = {
        "seconds": seconds,
        "timing": "CUDA graphs of cold calls, replayed in turns" if device.type == "cuda" else "calls",
    }
    made = ledger.begin("kernels", device, protocol, out=out)
    known = {_key(entry) for entry in made["entries"]}
    limits: ceilings.Ceilings | None = None
    for case in chosen:
        if _key_of(case) in known:
            continue
        if limits is None:
            limits = ceilings.measure(device, side=side, seconds=seconds)
            made["ceilings"] = asdict(limits)
        logger.info("%s", case.label)
        entry = _measure(case, device, limits, seconds)
        made["entries"].append(asdict(entry))
        if out is not None:
            ledger.write(made, out)
        if on_case is not None:
            on_case(entry)
        torch.compiler.reset()  # shapes of other cases, whose number Dynamo limits
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return made


@torch.inference_mode()
def _measure(case: Case, device: torch.device, limits: ceilings.Ceilings, seconds: float) -> Entry:
    generator = torch.Generator(device).manual_seed(0)
    sets = [case.make(generator) for _ in range(sets_for(case.bytes_moved))]
    recorded: dict[str, Recorded] = {}
    left_out: dict[str, str] = {}
    for name, rival in case.rivals.items():
        try:
            recorded[name] = record([_with(rival, inputs) for inputs in sets], device)
        except Exception as error:  # whatever a peer raises is the reason why it is left out
            if name == OURS:
                raise
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    times = in_turns_us(recorded, device, seconds=seconds)
    for made in recorded.values():  # so that what is compared was written by the replay
        for tensor in made.outputs:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 127)
        made.replay()
    exact = case.exact(sets[0])
    return Entry(
        operation=case.operation,
        size=case.shape.size,
        tokens=case.shape.tokens,
        images=case.shape.images,
        dtype=str(case.dtype).removeprefix("torch."),
        bytes_moved=case.bytes_moved,
        flops=case.flops,
        factors=case.factors,
        floor_us=limits.floor_us(case.bytes_moved, case.flops, case.factors),
        rivals={
            name: Timed(us=times[name], error=_error(case.rivals[name].checked(made.outputs), exact))
            for name, made in recorded.items()
        },
        left_out=left_out,
    )


def _with(rival: Rival, inputs: Inputs) -> Callable[[], Outputs]:
    return lambda: rival.call(inputs)


def _error(got: Iterable[Tensor], exact: Iterable[Tensor]) -> float | None:
    """The largest of all outputs."""
    errors = [
        float((one.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        for one, wanted in zip(got, exact, strict=True)
    ]
    return max(errors) if all(map(math.isfinite, errors)) else None


def _key_of(case: Case) -> tuple:
    shape = case.shape
    return case.operation, shape.size, shape.tokens, shape.images, str(case.dtype).removeprefix("torch.")


def _key(entry: dict) -> tuple:
    return tuple(entry[name] for name in ("operation", "size", "tokens", "images", "dtype"))
