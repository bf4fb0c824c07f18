"""Inputs become pixels in a process that can be killed: a decoder that crashes, hangs or eats memory costs one input.

One such process for each worker of Ray that reads. It is forked from a process that has PyTorch loaded already, and ends with the
worker.
"""

import functools
import json
import logging
import multiprocessing
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from clipdit.offline.folder import Record
from clipdit.offline.plan import Item
from clipdit.offline.steps import Work, quarantine, read
from clipdit_serve.decoding import _prepare_process

logger = logging.getLogger(__name__)

TIMEOUT_S = 120.0
"""In which an input must be fetched and decoded, seconds. The largest image that is taken needs about five."""
MEMORY_BYTES = 4 * 2**30
"""Address space the process may add to what it starts with. The largest image that is taken, of 89 million pixels, needs up to
three quarters of it."""


def read_all(items: list[Item], work: Work) -> list[tuple[dict, bytes | None]]:
    """(state, pixels) of each input: pixels of (3, H, W) uint8 and a state that says so, or a finished record and None."""
    scheduled = [(item, *_schedule(item, work)) for item in items]
    return [_result(item, work, pool, future, again=True) for item, pool, future in scheduled]


def _result(item: Item, work: Work, pool: ProcessPool, future: ProcessFuture, *, again: bool) -> tuple[dict, bytes | None]:
    try:
        return future.result()
    except FutureTimeout:
        reason = f"was not read within {TIMEOUT_S:g} s"
    except ProcessExpired as error:
        reason = f"the decoder crashed on it (exit code {error.exitcode})"
    except (BrokenProcessPool, RuntimeError):
        # Somebody killed a process that did nothing, as the kernel does when memory is short: the library then gives up the pool,
        # and whatever else was scheduled with it.
        if not again:
            raise
        if _pool() is pool:
            _pool.cache_clear()
        return _result(item, work, *_schedule(item, work), again=False)
    return {"record": asdict(quarantine(item, reason, 0.0))}, None


def _schedule(item: Item, work: Work) -> tuple[ProcessPool, ProcessFuture]:
    pool = _pool()
    try:
        return pool, pool.schedule(_read, args=(item, work), timeout=TIMEOUT_S)
    except (BrokenProcessPool, RuntimeError):
        _pool.cache_clear()
        pool = _pool()
        return pool, pool.schedule(_read, args=(item, work), timeout=TIMEOUT_S)


@functools.cache
def _pool() -> ProcessPool:
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return ProcessPool(max_workers=1, initializer=_prepare_process, initargs=(MEMORY_BYTES,), context=context)


def _read(item: Item, work: Work) -> tuple[dict, bytes | None]:
    """In the process that can be killed."""
    ready = read(item, work)
    if isinstance(ready, Record):
        return {"record": asdict(ready)}, None
    state = {
        "item": asdict(item),
        "shape": list(ready.image.shape),
        "placement": asdict(ready.placement),
        "notes": ready.notes,
        "ms": ready.ms,
    }
    return json.loads(json.dumps(state)), ready.image.numpy().tobytes()
