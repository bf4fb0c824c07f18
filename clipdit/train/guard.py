"""What watches over a run: sums of an interval, a loss that is no longer sensible, Ctrl-C, and settings that changed."""

import contextlib
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import Tensor

from clipdit.train.state import Progress

if TYPE_CHECKING:
    from clipdit.train.loop import TrainSettings

logger = logging.getLogger(__name__)

SAME_REQUEST_S = 1.0
"""torchrun passes a Ctrl-C on to processes that have had it from the terminal already: so close together the two are one."""


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
        values = cast(Tensor, accelerator.reduce(torch.stack([self.sums[name] for name in names]), "mean")) / self.steps
        row = {n if n == "gradient_norm" else f"loss/{n}": v for n, v in zip(names, values.tolist(), strict=True)}
        seconds = time.monotonic() - self.began
        return row | {"steps_per_s": self.steps / seconds, "loading_share": self.loading_s / seconds}


class Interrupt:
    """Inside the `with`, Ctrl-C and SIGTERM set `asked` instead of breaking off within a step; a later one breaks off."""

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = -math.inf

    def _ask(self, number: int, frame) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._asked_at = True, now
            logger.info("stopping after this step; once more to stop at once")
        elif now - self._asked_at > SAME_REQUEST_S:
            raise KeyboardInterrupt

    def __enter__(self) -> "Interrupt":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # signals belong to it
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make the folder if need be and keep other runs out of it. ValueError when another process trains into it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process is training into {folder}; wait for it, or give another folder") from None
    try:
        yield
    finally:
        lock.release()


NEGLIGIBLE = 1e-6
"""A loss below this is rounding, and may be ten times as large in the next interval: a student that is its teacher already."""


def check_sane(row: dict[str, float], progress: Progress, settings: "TrainSettings", *, saved: int) -> None:
    """Raises Diverged for a loss or gradient that is not finite, or a loss far above the lowest one so far. `saved` is the step
    of the last save."""
    rest = f"the checkpoint of step {saved} is intact. Lower train.lr (now {settings.lr:g})"
    for name, value in row.items():
        if not math.isfinite(value):
            raise Diverged(
                f"{name} became {value} by step {progress.step}; {rest} or train.clip_norm, or take train.precision fp32"
            )
    if row["loss/total"] > settings.divergence * max(progress.lowest_loss, NEGLIGIBLE) and progress.lowest_loss > 0:
        raise Diverged(
            f"the loss is {row['loss/total']:.4g} at step {progress.step}, more than {settings.divergence:g} times its lowest, "
            f"{progress.lowest_loss:.4g}; {rest}, or raise train.divergence"
        )


def check_plan(settings: "TrainSettings", minutes: float | None, processes: int) -> None:
    """ValueError for a time that is none, and for a batch that so many processes cannot share."""
    if minutes is not None and not 0 < minutes < math.inf:
        raise ValueError(f"minutes is {minutes}; wanted a number above 0")
    if settings.batch_size % (processes * settings.accumulate):
        raise ValueError(
            f"train.batch_size {settings.batch_size} does not divide among {processes} processes x {settings.accumulate} parts"
        )


ADDED_LATER = {"train.fused": False, "model.mlp": "gelu", "loss.alignment": 0.0, "objective.at_noise": 0.0}
"""Settings that runs begun before them do not name, with what such a run does."""


def check_same_experiment(stored: str, wanted: dict) -> None:
    """ValueError naming the first setting in which a run would be resumed differently from how it began.

    Only train.steps may change: a run can be prolonged. `data`, what it learns from, is compared where both sides tell it."""
    before, now = flat_as_now(json.loads(stored), wanted), flat(json.loads(json.dumps(wanted)))
    for name in before | now:
        untold = name.startswith("data.") and not (name in before and name in now)
        if before.get(name) != now.get(name) and name != "train.steps" and not untold:
            raise ValueError(
                f"the run began with {name} = {before.get(name)!r}, now it is {now.get(name)!r}; resume with what it began with"
            )


def flat_as_now(stored: dict, wanted: dict) -> dict[str, object]:
    """`flat` of an experiment of earlier, with what it did not name yet and `wanted` does."""
    now = flat(wanted)
    return {name: value for name, value in ADDED_LATER.items() if name in now} | flat(stored)


def flat(tree: dict, prefix: str = "") -> dict[str, object]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}."""
    found: dict[str, object] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
