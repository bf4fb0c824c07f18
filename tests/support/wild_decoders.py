"""Decoders that misbehave; a module of its own, so that decoding processes can import it."""

import os
import signal
import time


def hang(*_) -> None:
    time.sleep(60)


def crash(*_) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)
