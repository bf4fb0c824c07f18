"""Decoders that misbehave; a module of its own, so that decoding processes can import it."""

import os
import signal
import time
from pathlib import Path


def hang(*_) -> None:
    time.sleep(60)


def crash(*_) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave_a_mark(path: Path, seconds: float) -> None:
    """Shows that it was begun with, and takes its time."""
    path.touch()
    time.sleep(seconds)
