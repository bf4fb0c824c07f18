"""What watches over a run: sums of an interval, a loss that is no longer sensible, Ctrl-C, and settings that changed."""

import json
import logging
import math
import signal
import threading
import time
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor

from clipdit.train.state import Progress

if TYPE_CHECKING:
    from clipdit.train.loop import TrainSettings

logger = logging.getLogger(__name__)


class Diverged(ValueError):
    """Training went wrong; the message says when and what to change."""


class Interval:
    """Sums over the steps since the last row of the history. They stay on the device: reading one waits for the GPU."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.loading_s = 0.0
        self.began = time.monotonic()

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the steps and the processes, and how fast it went."""
        names = list(self.sums)
        values = accelerator.reduce(torch.stack([self.sums[name] for name in names]), "mean") / self.steps
        row = {n if n == "gradient_norm" else f"loss/{n}": v for n, v in zip(names, values.tolist(), strict=True)}
        seconds = time.monotonic() - self.began
        return row | {"steps_per_s": self.steps / seconds, "loading_share": self.loading_s / seconds}


class Interrupt:
    """Inside the `with`, Ctrl-C and SIGTERM set `asked` instead of breaking off within a step; a second one breaks off."""

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, number: int, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        logger.info("stopping after this step; once more to stop at once")

    def __enter__(self) -> "Interrupt":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # signals belong to it
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def check_sane(row: dict[str, float], progress: Progress, settings: "TrainSettings") -> None:
    """Raises Diverged for a loss or gradient that is not finite, or a loss far above the lowest one so far."""
    for name, value in row.items():
        if not math.isfinite(value):
            raise Diverged(
                f"{name} became {value} by step {progress.step}; the checkpoint of the last save is intact. Lower train.lr "
                f"(now {settings.lr:g}) or train.clip_norm, or use --train.precision fp32"
            )
    if row["loss/total"] > settings.divergence * progress.lowest_loss > 0:
        raise Diverged(
            f"the loss is {row['loss/total']:.4g} at step {progress.step}, {settings.divergence:g} times its lowest "
            f"{progress.lowest_loss:.4g}; the checkpoint of the last save is intact. Lower train.lr (now {settings.lr:g})"
        )


def check_same_experiment(stored: str, wanted: dict) -> None:
    """ValueError naming the first setting in which a run would be resumed differently from how it began."""
    before, now = _flat(json.loads(stored)), _flat(json.loads(json.dumps(wanted)))
    for name in before | now:
        if before.get(name) != now.get(name) and name not in ("train.steps",):
            raise ValueError(
                f"the run began with {name} = {before.get(name)!r}, now it is {now.get(name)!r}; resume with what it began with"
            )


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def agreed(accelerator: Accelerator, value: float) -> float:
    """The mean over the processes, so that all act alike. One process need not talk to itself."""
    if accelerator.num_processes == 1:
        return value
    return float(accelerator.reduce(torch.tensor(value, device=accelerator.device), "mean"))
