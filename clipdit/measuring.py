"""How long a call takes: always a median with its spread, and rivals measured in turns. On what machine: provenance.py."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Repeated measurements of one thing, in the unit its name says."""

    median: float
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""
    p95: float
    """95th percentile; the slowest of all where there are fewer than twenty."""
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """ValueError for no values."""
        ordered = sorted(values)
        if not ordered:
            raise ValueError("there is nothing to summarise: no measurements")
        last = len(ordered) - 1
        return cls(
            median=statistics.median(ordered),
            low=ordered[round(0.1 * last)],
            high=ordered[round(0.9 * last)],
            p95=ordered[math.ceil(0.95 * last)],
            count=len(ordered),
        )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; calls to an accelerator return before that."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_calls_ms(
    calls: Sequence[Callable[[], object]], device: torch.device, *, warm_up: int = 1, at_least: int = 5, seconds: float = 2.0
) -> list[Spread]:
    """Time several calls against one another, milliseconds. They take turns, so that a busy or slow moment falls on all of them.

    Args:
        device: waited for before and after each call.
        warm_up: untimed rounds before.
        at_least: rounds, even when they take longer than `seconds`.
        seconds: rounds go on until they have taken this long together.
    """
    times_ms: list[list[float]] = [[] for _ in calls]
    for _ in range(warm_up):
        for call in calls:
            call()
    began = time.perf_counter()
    while len(times_ms[-1]) < at_least or time.perf_counter() - began < seconds:
        for call, times in zip(calls, times_ms, strict=True):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times.append(1000 * (time.perf_counter() - start))
    return [Spread.of(times) for times in times_ms]
