"""A model that is replaced while it serves: what it must take, and what became of it.

The engines do the work (`clipdit_serve.engine.Engine.reload`); this is the order in which they are asked, and the record of it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from clipdit.backend import Limits
from clipdit.translator import Size
from clipdit_serve.engine import Engine, ModelInfo

logger = logging.getLogger(__name__)

Result = Literal["done", "refused"]


@dataclass(frozen=True, kw_only=True)
class Reload:
    """One reload that is over."""

    result: Result
    said: str
    """One line: what serves now, or why the old goes on."""
    at_s: float
    """When it was over, seconds since 1970."""


class Reloads:
    """Reloads the engines of a service, one after the other, so that there is one model more in memory than serve, and no more.
    An engine that refuses ends the reload: those after it keep what they have, those before it have the new one.

    Called in the thread of the event loop.

    Args:
        engines: by variant, the default first.
        on_end: called with the result of each.
    """

    def __init__(self, engines: Mapping[str, Engine], *, on_end: Callable[[Result], None] = lambda result: None):
        self._engines, self._on_end = engines, on_end
        self._task: asyncio.Task[None] | None = None
        self._again = False
        self.last: Reload | None = None

    @property
    def under_way(self) -> bool:
        return self._task is not None and not self._task.done()

    def ask(self) -> None:
        """One reload. While one is under way, one more after it, however often it is asked for: what lies in the folder may have
        been replaced after it was read."""
        if self.under_way:
            self._again = True
            logger.info("a reload is under way; one more follows it")
        else:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Wait for nothing more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._again = False
            await self._reload()
            if not self._again:
                return

    async def _reload(self) -> None:
        began, result, changes = time.monotonic(), "done", []
        for name, engine in self._engines.items():
            before, told = engine.model, f"{name} " if len(self._engines) > 1 else ""
            try:
                after = await asyncio.wrap_future(engine.reload())
            except Exception as error:  # whatever the new model breaks at, the old one goes on
                result = "refused"
                changes.append(f"{told}{_revision(before)} goes on: {error}")
                break
            changes.append(f"{told}{_revision(before)} -> {_revision(after)}")
        said = f"{'; '.join(changes)} ({time.monotonic() - began:.1f} s)"
        self.last = Reload(result=result, said=said, at_s=time.time())
        logger.log(logging.INFO if result == "done" else logging.ERROR, "reload %s: %s", result, said, extra={"reload": result})
        self._on_end(result)


def check_limits(old: Limits, new: Limits, size: Size) -> None:
    """ValueError unless a model of the new limits takes every image that was fitted to the old ones, and as it would fit it."""

    def names(sizes: tuple[tuple[int, int], ...]) -> str:
        return ", ".join(f"{width} x {height}" for height, width in sizes)

    if size is None and new.native_size != old.native_size:
        was, now = names((old.native_size,)), names((new.native_size,))
        raise ValueError(f"the new model is made for {now} and images are fitted to {was}; start the service anew for it")
    if size in ("own", "nearest"):
        if (old.sizes is None) != (new.sizes is None) or not set(old.sizes or ()) <= set(new.sizes or ()):
            was, now = (names(limits.sizes) if limits.sizes else "any size" for limits in (old, new))
            raise ValueError(f"the new model takes {now}, the old one {was}; start the service anew for it")
        if old.multiple % new.multiple:
            raise ValueError(
                f"the new model takes multiples of {new.multiple}, the old one of {old.multiple}; start the service anew for it"
            )
        return
    new.check_images((1, 3, *(size if isinstance(size, tuple) else new.native_size)))


def _revision(info: ModelInfo | None) -> str:
    return "nothing" if info is None else info.fingerprint[:12]
