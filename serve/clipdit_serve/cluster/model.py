"""A replica that holds a model: the engine of one process, asked from others.

`@serve.batch` is not used. Its queue knows no sizes that must not be mixed, no padding, no halves of a batch that failed, no
caller who left, and no batch that hangs; `InProcessEngine` has all of that, and its tests.

A replica whose model died or hangs for long ends itself. Ray sees that at once, sends its requests back to who sent them, and
starts another. Until then it keeps what it is sent: one that refused would look idle, and draw the requests of all others. What
holds the interpreter is found by Ray's own health check.
"""

import asyncio
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from uuid import uuid4

from clipdit_serve.batching import InProcessEngine, Model
from clipdit_serve.cluster.wire import Condition, Refusal, SentAnswer, SentTask, Started
from clipdit_serve.engine import BatchReport, ModelInfo
from clipdit_serve.errors import ApiError
from clipdit_serve.heap import limit_heaps
from clipdit_serve.logs import log_to_stderr
from clipdit_serve.settings import ServeSettings

logger = logging.getLogger(__name__)

LOOKS_EVERY_S = 0.2
"""At its own model."""

HANGS_FOR_S = 4.0
"""It counts as unready as soon as a batch hangs; after so many seconds more it ends. A machine that is too busy, or compiles,
comes back within them, and a replica that is started takes longer than that."""

REPORTS = 1000
"""Batches that are remembered for an ingress that asks."""


class ModelReplica:
    """Not ready, to Ray and everybody, before its model is warm.

    Args:
        open_model: called once; what it raises ends the replica.
        json: log as JSON lines.
    """

    async def __init__(self, open_model: Callable[[], Model], settings: ServeSettings, *, json: bool):
        limit_heaps()
        log_to_stderr(json)
        self._name, self._numbers = uuid4().hex, itertools.count(1)
        self._reports: deque[tuple[int, BatchReport]] = deque(maxlen=REPORTS)  # nobody was told of yet
        self._owed: dict[str, deque[tuple[int, BatchReport]]] = {}  # by asker, until he says to have them
        self._engine = InProcessEngine(open_model, settings)  # who sends tasks admits them, and Ray bounds their number
        self._engine.start(lambda report: self._reports.append((next(self._numbers), report)))
        while self._engine.health().state == "loading":
            await asyncio.sleep(0.02)
        if self._engine.failure is not None:
            raise self._engine.failure
        self._watching = asyncio.create_task(self._watch())

    async def translate(self, sent: SentTask) -> AsyncIterator[Started | SentAnswer | Refusal]:
        """`Started` when the image is in the model, and what became of it."""
        started = asyncio.Event()
        loop = asyncio.get_running_loop()
        try:
            ticket = self._engine.submit(sent.task(), lambda: _call_in(loop, started.set))
            answering = asyncio.ensure_future(ticket.answer())
            starting = asyncio.ensure_future(started.wait())
            try:
                await asyncio.wait((answering, starting), return_when=asyncio.FIRST_COMPLETED)
                if started.is_set():
                    yield Started()
                yield SentAnswer.of(await answering)
            finally:  # also where the caller left
                starting.cancel()
                answering.cancel()
                ticket.leave()
        except ApiError as error:
            yield Refusal.of(error)

    async def ask(self, sent: SentTask) -> SentAnswer | Refusal:
        """What became of an image, without a word of when it started: that takes a message less."""
        try:
            return SentAnswer.of(await self._engine.translate(sent.task()))
        except ApiError as error:
            return Refusal.of(error)

    async def condition(self, asker: str, had: Mapping[str, int]) -> Condition:
        """An answer may come too late for an ingress that is busy, and is thrown away: so reports are kept until it has them.

        Args:
            had: by replica the last report that the asker has.
        """
        model = self._engine.model
        assert model is not None, "the replica is not ready before it is warm"
        owed = self._owed.setdefault(asker, deque(maxlen=REPORTS))
        while self._reports:  # the model's thread adds to them
            owed.append(self._reports.popleft())
        while owed and owed[0][0] <= had.get(self._name, 0):
            owed.popleft()
        return Condition(health=self._engine.health(), model=model, replica=self._name, reports=tuple(owed))

    async def reload(self) -> ModelInfo | str:
        """The new model; or why the old one goes on."""
        try:
            return await asyncio.wrap_future(self._engine.reload())
        except Exception as error:  # whatever the new model breaks at: it is the answer
            return str(error) or type(error).__name__

    def check_health(self) -> None:
        """Ray replaces a replica whose check raises."""
        health = self._engine.health()
        if health.state == "dead":
            raise RuntimeError(health.said)

    async def _watch(self) -> None:
        well_s = time.monotonic()
        while True:
            await asyncio.sleep(LOOKS_EVERY_S)
            health = self._engine.health()
            if health.state == "ready":
                well_s = time.monotonic()
            if health.state == "dead" or time.monotonic() - well_s > HANGS_FOR_S:
                logger.critical("a model replica ends, and another is started: %s", health.said)
                logging.shutdown()
                os._exit(1)  # a thread that hangs would keep any other end waiting

    def __del__(self) -> None:
        """Called by Ray when the replica is not needed any more, and nobody waits for it."""
        if hasattr(self, "_watching"):
            self._watching.cancel()
        if hasattr(self, "_engine"):
            self._engine.close()


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)
