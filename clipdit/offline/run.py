"""The engine of one process: threads read ahead and write behind, the calling thread keeps the model busy.

    reader threads   decode, fit                 up to AHEAD_BATCHES in front of the model
    calling thread   batches of equal size       out of memory halves them; the same images are tried again
    writer threads   restore, encode, rename     while the next batch is in the model
    calling thread   finished records            a batch's, when all its images are in place

A bad input costs its own place only. What stops the job (no space, no permission to write) leaves a ledger that is right.
"""

import logging
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from clipdit.offline.engine import Finished, Model, model_of
from clipdit.offline.folder import Record, printable
from clipdit.offline.plan import Item
from clipdit.offline.steps import Halving, Ready, Work, read, write
from clipdit.translator import Sampling, Translator

logger = logging.getLogger(__name__)

AHEAD_BATCHES = 2
"""Batches of decoded inputs that may wait for the model."""


class LocalEngine:
    """Runs jobs with a translator in this process. It does not close the translator."""

    name = "local"

    def __init__(self, translator: Translator):
        self.translator = translator

    def describe(self, sampling: Sampling) -> Model:
        return model_of(self.translator, sampling)

    def run(self, items: Iterable[Item], work: Work, finished: Finished) -> int:
        run = _Run(self.translator, work, finished)
        run.run(items)
        return run.translate.batch_size


class _Run:
    """One pass over the inputs of a job. The translator is used by the thread that calls `run` alone."""

    def __init__(self, translator: Translator, work: Work, finished: Finished):
        self.work, self.finished = work, finished
        self.translate = Halving(translator, work.sampling, work.batch_size, _say_halved)
        self.ahead = AHEAD_BATCHES * work.batch_size + work.workers
        self.pool = ThreadPoolExecutor(work.workers, thread_name_prefix="clipdit-images")
        self.writing: list[Future[Record]] = []
        self.rejected: list[Record] = []

    def run(self, items: Iterable[Item]) -> None:
        queue = iter(items)
        reading: deque[Future[Ready | Record]] = deque()
        waiting: dict[torch.Size, list[Ready]] = {}
        try:
            while True:
                while len(reading) < self.ahead and (item := next(queue, None)) is not None:
                    reading.append(self.pool.submit(read, item, self.work))
                if not reading:
                    break
                result = reading.popleft().result()
                if isinstance(result, Record):
                    self._reject(result)
                    continue
                batch_size = self.translate.batch_size
                group = waiting.setdefault(result.image.shape, [])
                group.append(result)
                if len(group) < batch_size and sum(map(len, waiting.values())) >= AHEAD_BATCHES * batch_size:
                    group = max(waiting.values(), key=len)  # images of many sizes: none may wait for ever
                elif len(group) < batch_size:
                    continue
                self._batch(waiting.pop(group[0].image.shape))
            for group in waiting.values():
                self._batch(group)
            self._settle()
        finally:
            self.pool.shutdown(cancel_futures=True)

    def _reject(self, record: Record) -> None:
        logger.warning("%s: %s", printable(record.id), record.reason)
        self.rejected.append(record)
        if len(self.rejected) >= self.translate.batch_size:
            self._settle()

    def _batch(self, group: list[Ready]) -> None:
        """Translate inputs of equal size, and hand the results to the writers."""
        results = self.translate([ready.image for ready in group], [ready.item.seed for ready in group])
        self._settle()  # the batch before this one: its writers had all the time of this one
        for ready, (output, ms) in zip(group, results, strict=True):
            if output is None:
                self._reject(write(ready.item, ready.placement, ready.notes, None, ready.ms + ms, self.work.folder))
            else:
                self.writing.append(
                    self.pool.submit(write, ready.item, ready.placement, ready.notes, output, ready.ms + ms, self.work.folder)
                )

    def _settle(self) -> None:
        """Wait for the writers, then hand over what is finished: also if one of them failed."""
        records, self.rejected = self.rejected, []
        failure = None
        for future in self.writing:
            try:
                records.append(future.result())
            except OSError as error:
                failure = error
        self.writing = []
        self.finished(records)
        if failure is not None:
            raise failure


def _say_halved(before: int, after: int) -> None:
    logger.warning("out of memory with %d images at once; going on with %d", before, after)
