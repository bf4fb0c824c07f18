"""How long batches take, from those that ran: when to come again, what would come too late, what hangs."""

import math
import time
from collections import deque
from threading import Lock

REMEMBERED = 32
"""Batches that are looked back upon."""

PATIENCE = 10.0
"""A batch hangs when it takes so many times what the slowest of those took, image for image and step for step. Ten: a second
program on the machine makes everything twice as slow, a first batch of a new shape compiles."""


class Pace:
    """Times of batches. Any thread may call it.

    Args:
        hang_s: what takes less never hangs, seconds.
    """

    def __init__(self, *, hang_s: float):
        self._hang_s = hang_s
        self._lock = Lock()
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._rates: deque[float] = deque(maxlen=REMEMBERED)
        self._running: tuple[float, float] | None = None  # (began at, cost)

    def begin(self, cost: float) -> None:
        """A batch starts. cost: what its time should be proportional to, such as images times steps."""
        with self._lock:
            self._running = (time.monotonic(), cost)

    def end(self) -> float:
        """It is done; returns its seconds."""
        with self._lock:
            assert self._running is not None
            began, cost = self._running
            seconds = time.monotonic() - began
            self._seconds.append(seconds)
            self._rates.append(seconds / cost)
            self._running = None
            return seconds

    def forget(self) -> None:
        """The times of all batches so far say nothing."""
        with self._lock:
            self._seconds.clear()
            self._rates.clear()

    def abandon(self) -> None:
        """It failed: its time says nothing."""
        with self._lock:
            self._running = None

    @property
    def batch_s(self) -> float | None:
        """Mean seconds of a batch; None before the first."""
        with self._lock:
            return sum(self._seconds) / len(self._seconds) if self._seconds else None

    def hangs_for_s(self) -> float:
        """How much longer than it may the batch takes that runs now, seconds; 0 when it does not, or none runs."""
        with self._lock:
            if self._running is None:
                return 0.0
            began, cost = self._running
            allowed = max(self._hang_s, PATIENCE * cost * max(self._rates, default=0.0))
            return max(0.0, time.monotonic() - began - allowed)

    def wait_s(self, batches: int) -> float:
        """How long so many batches take, seconds; 0 as long as nothing is known."""
        return batches * (self.batch_s or 0.0)


def whole_seconds(seconds: float) -> int:
    """As Retry-After has it: rounded up, at least 1."""
    return max(1, math.ceil(seconds))
