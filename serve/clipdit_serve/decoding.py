"""Uploads become pixels in processes that can be killed: a decoder that crashes, hangs or eats memory costs one request.

The processes are forked from a server process that has PyTorch loaded already, so a killed one is replaced within milliseconds.
"""

import asyncio
import logging
import multiprocessing
import resource
import signal
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from pebble import ProcessExpired, ProcessPool
from torch import Tensor

from clipdit.backend import Limits
from clipdit.images import Fit, ImageError, Placement, decode_image
from clipdit.translator import Size, fit_within
from clipdit_serve.errors import IMAGE_FAULTS, ApiError
from clipdit_serve.settings import FORMATS, ServeSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Upload:
    """A decoded image, fitted to the model."""

    image: UInt8[Tensor, "3 H W"]
    placement: Placement
    """The way back to the size it came with."""
    notes: tuple[str, ...]
    """What had to be converted on the way in."""


class Decoder(Protocol):
    """What the routes ask for."""

    @property
    def ready(self) -> bool: ...

    async def start(self) -> None:
        """Returns when it is ready."""
        ...

    def close(self) -> None:
        """Whoever still waits gets an error."""
        ...

    async def decode(self, data: bytes, limits: Limits, size: Size, fit: Fit) -> Upload:
        """An image for a model of these limits; see `clipdit.translator.fit_within`. ApiError for what is no image or may not be
        decoded."""
        ...


class DecodePool:
    """A `Decoder` of processes. `start` it within an event loop; `close` it."""

    def __init__(self, settings: ServeSettings):
        self._settings = replace(settings, api_key=None)  # it travels to the processes, which have no use for a key
        self._pool: ProcessPool | None = None
        self.ready = False

    async def start(self) -> None:
        """Start the processes, and wait until they answer."""
        self._pool = self._new_pool()
        await asyncio.gather(*(self._call(_warm) for _ in range(self._settings.decode_processes)))
        self.ready = True

    def _new_pool(self) -> ProcessPool:
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        return ProcessPool(
            max_workers=self._settings.decode_processes,
            initializer=_prepare_process,
            initargs=(self._settings.decode_memory_bytes,),
            context=context,
        )

    async def decode(self, data: bytes, limits: Limits, size: Size, fit: Fit) -> Upload:
        work = partial(_decode, data, self._settings, limits, size, fit)
        try:
            pixels, placement, notes = await self._call(work, self._settings.decode_timeout_s)
        except ImageError as error:
            raise ApiError(IMAGE_FAULTS[error.fault], f"the image {error.reason}", param="image") from error
        except FutureTimeout as error:
            limit = f"{self._settings.decode_timeout_s:g} s"
            raise ApiError(
                "image_timeout", f"the image was not decoded within {limit}; send a simpler one", param="image"
            ) from error
        except ProcessExpired as error:
            raise ApiError("image_damaged", "the decoder crashed on this image", param="image") from error
        return Upload(image=torch.from_numpy(pixels), placement=placement, notes=notes)

    async def _call(self, work: Any, timeout_s: float | None = None) -> Any:
        assert self._pool is not None, "start() was not called"
        try:
            return await _result(self._pool.schedule(work, timeout=timeout_s))
        except (BrokenProcessPool, RuntimeError):
            if not self.ready:
                raise
        # Somebody killed a process that did nothing, as the kernel does when memory is short: the library then gives up the pool.
        logger.warning("the decoding processes were killed; starting others")
        self._pool = self._new_pool()
        return await _result(self._pool.schedule(work, timeout=timeout_s))

    def close(self) -> None:
        """Kill the processes; whoever still waits gets an error."""
        self.ready = False
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()


async def _result(future: Future) -> Any:
    """Of work that goes on when who waits for it leaves. To cancel it would kill the process that has it, for the sake of
    milliseconds; and 1.6 kB of ours a time did not come back (measured over 15,000 such callers)."""
    return await asyncio.shield(asyncio.wrap_future(future))


def _decode(
    data: bytes, settings: ServeSettings, limits: Limits, size: Size, fit: Fit
) -> tuple[np.ndarray, Placement, tuple[str, ...]]:
    """In a process of its own. An array and no tensor: tensors would travel through shared memory, which a kill leaves behind."""
    decoded = decode_image(data, max_pixels=settings.max_pixels, max_side=settings.max_side, formats=FORMATS, animated=False)
    try:
        image, placement = fit_within(limits, decoded.pixels, size, fit)
    except (RuntimeError, MemoryError) as error:  # PyTorch's CPU allocator raises the former
        raise ImageError("needs more memory than there is. Scale it down first", fault="large") from error
    return image.numpy(), placement, decoded.notes


def _warm() -> None:
    """What the first call of each kind sets up."""
    torch.zeros(1)


def _prepare_process(more_bytes: int) -> None:
    """At the start of each process: one core, death at once when told to (the pool's own handler waits for the decoder), and
    so much address space more than it has now. Only Linux tells how much that is."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    statm = Path("/proc/self/statm")
    if statm.exists():
        now_bytes = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now_bytes + more_bytes, now_bytes + more_bytes))
