"""The resumable state of a run: one safetensors file, replaced as a whole or not at all.

Weights, optimiser moments and moving averages go in by parameter name, the step and the elapsed time into the file's metadata.
Nothing else is needed to go on exactly (see clipdit.train.order).
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clipdit.files import replace_file

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


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically. OSError with one clear line when the disk does not take it."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # it wraps the operating system's error in text
            raise OSError(
                f"{path} was not written: {error}. What was saved before is intact; free some space and resume"
            ) from error

    replace_file(path, write, durable=True)


def save_state(
    folder: Path,
    parameters: Iterable[tuple[str, nn.Parameter]],
    averages: Iterable[Tensor] | None,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Write the state of a run. `averages` are in the order of `parameters`, or None."""
    named = list(parameters)
    tensors: dict[str, Tensor] = {f"parameter/{name}": p for name, p in named}
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
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); start again in another folder") from error


def load_state(
    folder: Path,
    parameters: Iterable[tuple[str, nn.Parameter]],
    averages: Iterable[Tensor] | None,
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Read back what `save_state` wrote, in place. ValueError if it belongs to another network; nothing was changed then."""
    progress = read_progress(folder)
    path, named = folder / STATE_FILE, list(parameters)
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
        wanted = {f"parameter/{name}": p for name, p in named}
        if averages is not None:
            wanted |= {f"average/{name}": p for name, p in named}
        stored = {key for key in keys if key.startswith(("parameter/", "average/") if averages is not None else "parameter/")}
        if odd := sorted(wanted.keys() ^ stored):
            raise ValueError(f"{path} belongs to another network: {odd[0].partition('/')[2]} is on one side only")
        for key, p in wanted.items():
            if (shape := file.get_slice(key).get_shape()) != list(p.shape):
                raise ValueError(
                    f"{path} belongs to another network: {key.partition('/')[2]} is {shape} there, {list(p.shape)} here"
                )
        with torch.no_grad():
            for name, p in named:
                p.copy_(file.get_tensor(f"parameter/{name}"))
            if averages is not None:
                for (name, _), average in zip(named, averages, strict=True):
                    average.copy_(file.get_tensor(f"average/{name}"))
        for name, p in named:
            prefix = f"optimizer/{name}/"
            state = {key.removeprefix(prefix): file.get_tensor(key) for key in keys if key.startswith(prefix)}
            optimizer.state[p] = {key: _like(p, value) for key, value in state.items()}
    return progress


def _like(p: nn.Parameter, value: Tensor) -> Tensor:
    """A tensor of the optimiser where and as the optimiser wants it. Moments lie in memory as their parameter does (channels last
    in a VAE): fused AdamW walks through both in memory order, and would silently mix up their entries otherwise."""
    if value.shape == p.shape and value.ndim:
        return torch.empty_like(p, dtype=value.dtype).copy_(value)
    return value.to(p.device) if p.is_cuda else value  # "step": on the CPU unless fused on a GPU
