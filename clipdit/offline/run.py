"""Running a job: threads read ahead and write behind, the calling thread keeps the model busy.

    reader threads   decode, fit                 up to AHEAD_BATCHES in front of the model
    calling thread   batches of equal size       out of memory halves them; the same images are tried again
    writer threads   restore, encode, rename     while the next batch is in the model
    calling thread   ledger                      a batch's lines, when all its images are in place

A bad input costs its own place only. What stops the job (no space, no permission to write) leaves a ledger that is right.
"""

import errno
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from clipdit.images import WRITE_FORMATS, Fit, ImageError, Placement, decode_image, encode_image
from clipdit.offline.folder import JobFolder, Record, printable
from clipdit.offline.plan import Item
from clipdit.translator import Sampling, Size, Translator

logger = logging.getLogger(__name__)

AHEAD_BATCHES = 2
"""Batches of decoded inputs that may wait for the model."""

_IMAGE_ERRORS = (ValueError, RuntimeError, MemoryError)
"""What decoding, resizing and encoding raise over one odd image; PyTorch's own is RuntimeError."""

_NAME_ERRORS = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EILSEQ, errno.EINVAL}
"""Errors of one output's name. Other errors in writing would meet every output, so they stop the job."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is, in inputs."""

    total: int
    finished: int
    """Written or quarantined, earlier runs included."""
    quarantined: int


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """An input on its way to the model."""

    item: Item
    image: UInt8[Tensor, "3 H W"]
    """Fitted."""
    placement: Placement
    notes: tuple[str, ...]
    ms: float


class Run:
    """One pass over the inputs of a job.

    Args:
        translator: used by the thread that calls `run` alone.
        folder: opened; its ledger gets what is finished.
        kept: records that are in the ledger already.
        total: inputs of the job, for progress.
        size, fit, sampling: as `Translator.fit` and `Translator.__call__` take them.
        batch_size: halved when memory runs out.
        workers: threads that read and write.
        on_progress: called by the thread that runs, before the first image and after every batch.

    `finished` and `quarantined` count what is in the ledger.
    """

    def __init__(
        self,
        translator: Translator,
        folder: JobFolder,
        *,
        kept: int,
        total: int,
        size: Size,
        fit: Fit,
        sampling: Sampling,
        batch_size: int,
        workers: int,
        on_progress: Callable[[Progress], None] | None,
    ):
        self.translator, self.folder, self.total, self.on_progress = translator, folder, total, on_progress
        self.size: Size = size
        self.fit: Fit = fit
        self.sampling, self.batch_size = sampling, batch_size
        self.ahead = AHEAD_BATCHES * batch_size + workers
        self.finished, self.quarantined = kept, 0
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="clipdit-images")
        self.writing: list[Future[Record]] = []
        self.rejected: list[Record] = []

    def run(self, items: Iterable[Item]) -> None:
        """Finish every item. OSError when an output or the ledger cannot be written."""
        queue = iter(items)
        reading: deque[Future[_Ready | Record]] = deque()
        waiting: dict[torch.Size, list[_Ready]] = {}
        self._report()
        try:
            while True:
                while len(reading) < self.ahead and (item := next(queue, None)) is not None:
                    reading.append(self.pool.submit(self._read, item))
                if not reading:
                    break
                result = reading.popleft().result()
                if isinstance(result, Record):
                    self._reject(result)
                    continue
                group = waiting.setdefault(result.image.shape, [])
                group.append(result)
                if len(group) < self.batch_size and sum(map(len, waiting.values())) >= AHEAD_BATCHES * self.batch_size:
                    group = max(waiting.values(), key=len)  # images of many sizes: none may wait for ever
                elif len(group) < self.batch_size:
                    continue
                self._batch(waiting.pop(group[0].image.shape))
            for group in waiting.values():
                self._batch(group)
            self._settle()
        finally:
            self.pool.shutdown(cancel_futures=True)

    def _read(self, item: Item) -> _Ready | Record:
        start_s = time.perf_counter()
        try:
            decoded = decode_image(item.source)
            image, placement = self.translator.fit(decoded.pixels, self.size, self.fit)
        except _IMAGE_ERRORS as error:
            reason = error.reason if isinstance(error, ImageError) else str(error) or type(error).__name__
            return _quarantine(item, reason, _ms_since(start_s))
        return _Ready(item=item, image=image, placement=placement, notes=decoded.notes, ms=_ms_since(start_s))

    def _reject(self, record: Record) -> None:
        logger.warning("%s: %s", printable(record.id), record.reason)
        self.rejected.append(record)
        if len(self.rejected) >= self.batch_size:
            self._settle()

    def _batch(self, group: list[_Ready]) -> None:
        """Translate inputs of equal size, and hand the results to the writers."""
        results: list[tuple[Tensor | None, float]] = []
        while len(results) < len(group):
            chunk = group[len(results) : len(results) + self.batch_size]
            start_s = time.perf_counter()
            outputs = self._translate(chunk)
            if outputs is not None:
                results += [(output, _ms_since(start_s) / len(chunk)) for output in outputs]
            elif len(chunk) == 1:
                results.append((None, _ms_since(start_s)))
            else:
                self.batch_size = len(chunk) // 2
                logger.warning("out of memory with %d images at once; going on with %d", len(chunk), self.batch_size)
        self._settle()  # the batch before this one: its writers had all the time of this one
        for ready, (output, ms) in zip(group, results, strict=True):
            if output is None:
                height, width = ready.image.shape[-2:]
                self._reject(_quarantine(ready.item, f"not enough memory for one image of {width} x {height}", ready.ms + ms))
            else:
                self.writing.append(self.pool.submit(self._write, ready, output, ready.ms + ms))

    def _translate(self, chunk: list[_Ready]) -> Tensor | None:
        """None when there is not enough memory. In a method of its own: the error's traceback would keep the tensors alive."""
        try:
            images, seeds = torch.stack([ready.image for ready in chunk]), [ready.item.seed for ready in chunk]
            return self.translator(images, seeds=seeds, **self.sampling)
        except (RuntimeError, MemoryError) as error:
            # PyTorch's CPU allocator raises a plain RuntimeError
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _write(self, ready: _Ready, output: UInt8[Tensor, "3 H W"], ms: float) -> Record:
        start_s = time.perf_counter()
        item = ready.item
        path = self.folder.path / item.output
        try:
            data = encode_image(ready.placement.restore(output), WRITE_FORMATS[path.suffix.lower()])
        except (*_IMAGE_ERRORS, OSError) as error:  # a format's largest side, mostly
            return _quarantine(item, f"the result cannot be encoded as {path.suffix[1:]}: {error}", ms + _ms_since(start_s))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = self.folder.write_file(path, data)
        except OSError as error:
            if error.errno not in _NAME_ERRORS:
                raise
            return _quarantine(item, f"the output cannot be written: {error.strerror}", ms + _ms_since(start_s))
        return Record(
            id=item.id,
            input=item.source,
            output=item.output,
            status="written",
            reason=None,
            sha256=digest,
            seed=item.seed,
            notes=ready.notes,
            ms=round(ms + _ms_since(start_s), 3),
        )

    def _settle(self) -> None:
        """Wait for the writers, then bring what is finished to the ledger: also if one of them failed."""
        records, self.rejected = self.rejected, []
        failure = None
        for future in self.writing:
            try:
                records.append(future.result())
            except OSError as error:
                failure = error
        self.writing = []
        self.folder.append(records)
        self.finished += len(records)
        self.quarantined += sum(record.status == "quarantined" for record in records)
        if failure is not None:
            raise failure
        self._report()

    def _report(self) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(total=self.total, finished=self.finished, quarantined=self.quarantined))


def _quarantine(item: Item, reason: str, ms: float) -> Record:
    return Record(
        id=item.id,
        input=item.source,
        output=None,
        status="quarantined",
        reason=" ".join(reason.split()),
        sha256=None,
        seed=item.seed,
        ms=round(ms, 3),
    )


def _ms_since(start_s: float) -> float:
    return 1000 * (time.perf_counter() - start_s)
