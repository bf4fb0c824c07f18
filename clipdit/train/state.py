"""The resumable state of a run: one safetensors file, replaced as a whole or not at all.

Weights, optimiser moments and moving averages go in by parameter name, the step and the elapsed time into the file's metadata.
Nothing else is needed to go on exactly (see clipdit.train.order).
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

STATE_FILE = "training_state.safetensors"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimiser steps done."""
    seconds: float = 0.0
    """Time spent training, over all resumptions."""
    lowest_loss: float = float("inf")
    """The lowest mean loss of a logging interval; divergence is judged by it."""
    experiment: str = ""
    """The resolved experiment as JSON: a run is resumed by the settings that began it."""


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """`write` a new file beside `path`, then put it in its place in one step. A failure leaves the old file and no litter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that nobody else can read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically. OSError with one clear line when the disk does not take it."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # it wraps the operating system's error in text
            raise OSError(
                f"{path} was not written: {error}. The last good checkpoint is intact; free some space and resume"
            ) from error

    replace_file(path, write)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing."""
    for part in folder.rglob(".*.part"):
        part.unlink(missing_ok=True)


def save_state(
    folder: Path,
    parameters: Iterable[tuple[str, nn.Parameter]],
    averages: Iterable[Tensor] | None,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Write the state of a run. `averages` are in the order of `parameters`, or None."""
    named = list(parameters)
    tensors = {f"parameter/{name}": p for name, p in named}
    if averages is not None:
        tensors |= {f"average/{name}": a for (name, _), a in zip(named, averages, strict=True)}
    for name, p in named:
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    save_tensors(folder / STATE_FILE, tensors, {"progress": json.dumps(asdict(progress))})


def read_progress(folder: Path) -> Progress:
    """How far the run in `folder` has come. ValueError if there is none, or it is damaged."""
    path = folder / STATE_FILE
    if not path.exists():
        raise ValueError(f"{folder} holds no {STATE_FILE}, so there is nothing to resume; leave out --resume to start")
    try:
        with safe_open(path, framework="pt") as file:
            return Progress(**json.loads(file.metadata()["progress"]))
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); start again in another folder") from error


def load_state(
    folder: Path,
    parameters: Iterable[tuple[str, nn.Parameter]],
    averages: Iterable[Tensor] | None,
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Read back what `save_state` wrote, in place. ValueError if it belongs to another network."""
    progress = read_progress(folder)
    named = list(parameters)
    with safe_open(folder / STATE_FILE, framework="pt") as file:
        keys = set(file.keys())
        wanted = {f"parameter/{name}" for name, _ in named}
        stored = {key for key in keys if key.startswith("parameter/")}
        if wanted != stored:
            odd = sorted(wanted ^ stored)[0].removeprefix("parameter/")
            raise ValueError(f"{folder / STATE_FILE} belongs to another network: {odd} is on one side only")
        with torch.no_grad():
            for name, p in named:
                p.copy_(file.get_tensor(f"parameter/{name}"))
            if averages is not None:
                for (name, _), average in zip(named, averages, strict=True):
                    average.copy_(file.get_tensor(f"average/{name}"))
        for name, p in named:
            prefix = f"optimizer/{name}/"
            state = {key.removeprefix(prefix): file.get_tensor(key) for key in keys if key.startswith(prefix)}
            # "step" stays where the optimiser keeps it (the CPU, unless fused on a GPU); the moments follow their parameter
            optimizer.state[p] = {k: v.to(p.device) if v.ndim or p.is_cuda else v for k, v in state.items()}
    return progress
