"""What a translation costs with each method: parameters, operations, and milliseconds measured in turns in one process."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clipdit.files import write_atomically
from clipdit.measuring import time_calls_ms
from clipdit.pipeline import load_checkpoint
from clipdit.provenance import provenance
from clipdit.translator import Translator

COST_FILE = "cost.json"


@torch.inference_mode()
def measure(wanted: Mapping[str, tuple[Path, int | None]], out: Path, device: str | None) -> None:
    """Write COST_FILE in `out`, unless it tells of all that is wanted already.

    Args:
        wanted: name -> checkpoint folder and number of sampling steps, None for its default.
        out: the folder of the comparison.
        device: where to translate; None is the best one here.
    """
    file = out / COST_FILE
    if not wanted or wanted.keys() == read(out)["cost"].keys():
        return
    opened = {folder: Translator.open(folder, backend="eager", device=device) for folder in {f for f, _ in wanted.values()}}
    limits = next(iter(opened.values())).backend.limits
    source = torch.randint(0, 256, (1, 3, *limits.native_size), dtype=torch.uint8)
    calls = [
        lambda folder=folder, steps=steps: opened[folder](source, seeds=[0], steps=steps) for folder, steps in wanted.values()
    ]
    cost = {}
    for (name, (folder, _)), call in zip(wanted.items(), calls, strict=True):
        with FlopCounterMode(display=False) as counter:
            call()
        cost[name] = {"parameters": _parameters(folder), "gflop_per_image": counter.get_total_flops() / 1e9}
    for name, spread in zip(wanted, time_calls_ms(calls, limits.device, warm_up=1, at_least=7, seconds=0), strict=True):
        cost[name]["ms_per_image"] = asdict(spread)
    for translator in opened.values():
        translator.backend.close()
    report = {"images": 1, "device": str(limits.device), "cost": cost, **provenance()}
    write_atomically(file, json.dumps(report, indent=2) + "\n")


def read(out: Path) -> dict:
    """What `measure` wrote; of nothing when it has not."""
    file = out / COST_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"device": None, "cost": {}}


def _parameters(checkpoint: Path) -> int:
    """Of all networks that take part in a translation."""
    parts = load_checkpoint(checkpoint).components.values()
    return sum(p.numel() for part in parts if isinstance(part, nn.Module) for p in part.parameters())
