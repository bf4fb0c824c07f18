"""Running a job: threads read ahead and write behind, the calling thread keeps the model busy.

    reader threads   decode, fit                 up to AHEAD_BATCHES in front of the model
    calling thread   batches of equal size       out of memory halves them; the same images are tried again
    writer threads   restore, encode, rename     while the next batch is in the model
    calling thread   ledger                      a batch's lines, when all its images are in place

A bad input costs its own place only. What stops the job (no space, no permission to write) leaves a ledger that is right.
"""

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from clipdit.images import WRITE_FORMATS, Fit, ImageError, Placement, decode_image, encode_image
from clipdit.offline.folder import JobFolder, Record
from clipdit.offline.plan import MANIFEST_SUFFIXES, WORK_FOLDER, Item, Plan, check, plan_folder, plan_manifest
from clipdit.translator import Size, Translator

logger = logging.getLogger(__name__)

AHEAD_BATCHES = 2
"""Batches of decoded inputs that may wait for the model."""

BATCH_SIZE = {"cuda": 32}
"""Images in one call when nobody says otherwise, by device; elsewhere 8."""

_IMAGE_ERRORS = (ValueError, RuntimeError, MemoryError)
"""What decoding, resizing and encoding raise over one odd image; PyTorch's own is RuntimeError."""

_NAME_ERRORS = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EILSEQ, errno.EINVAL}
"""Errors of one output's name. Other errors in writing would meet every output, so they stop the job."""


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """What decides how the outputs of a job look. A resumed job must have the same."""

    seed: int = 0
    """Of the job; each image gets its own from it, see `item_seed`."""
    size: Size = None
    """What images are fitted to; None is the size the checkpoint was trained at."""
    fit: Fit = "pad"
    """How; see `clipdit.images.fit`."""
    format: str = "png"
    """png, webp or jpeg: of outputs whose name does not say otherwise."""
    keep_suffix: bool = False
    """Outputs are named a.jpg.png and not a.png."""
    steps: int | None = None
    """Solver steps; None is the checkpoint's default, as for the next two."""
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 is none."""
    solver: str | None = None
    """Name of the solver."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; wanted an integer from 0 to 2**63 - 1")
        if f".{self.format}" not in WRITE_FORMATS:
            raise ValueError(f"format is {self.format}; wanted one of {', '.join(s[1:] for s in WRITE_FORMATS)}")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is, in inputs."""

    total: int
    finished: int
    """Written or quarantined, earlier runs included."""
    quarantined: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What one run of a job came to, in inputs unless it says otherwise."""

    total: int
    written: int
    """In this run."""
    kept: int
    """Written by earlier runs and found intact."""
    quarantined: int
    ignored: int
    """Files in the input folder that are no images."""
    unreadable: int
    """Sub-folders of the input folder that could not be listed."""
    seconds: float
    """From the first image read to the last one written."""
    batch_size: int
    """Images in one call, at the end of the run."""


def run_job(
    translator: Translator,
    source: Path,
    output: Path,
    settings: JobSettings | None = None,
    *,
    batch_size: int | None = None,
    resume: bool = False,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Translate a folder or a manifest of images into an output folder.

    Args:
        source: the input folder, or a manifest; see `plan_folder` and `plan_manifest`.
        output: the output folder; it must be new or empty, or hold this very job and `resume` be true.
        batch_size: images in one call; None is 32 on CUDA and 8 elsewhere, or less if the backend takes less.
        resume: go on with the job in `output`, if there is one. Intact outputs stay; inputs that are quarantined, new in the
            folder, or whose output is gone or altered are done.
        workers: threads that read and write; None is one a core, at most 8.
        on_progress: called by this thread before the first image and after every batch.

    Raises:
        ValueError: the inputs, the settings or the output folder will not do (then nothing was done), or writing became
            impossible (then a resume goes on).
    """
    settings = settings or JobSettings()
    limits = translator.backend.limits
    default = BATCH_SIZE.get(limits.device.type, 8)
    batch_size = min(default, limits.max_batch or default) if batch_size is None else batch_size
    if batch_size < 1 or (limits.max_batch is not None and batch_size > limits.max_batch):
        raise ValueError(f"batch size is {batch_size}; this backend takes 1 to {limits.max_batch or 'any number'}")
    if isinstance(settings.size, tuple):
        limits.check_images((1, 3, *settings.size))
    identity = _identity(translator, source, settings)
    planner = plan_manifest if source.suffix.lower() in MANIFEST_SUFFIXES and not source.is_dir() else plan_folder
    folder = JobFolder(output)
    _check_output(folder, resume)
    plan = planner(source, output, seed=settings.seed, suffix=f".{settings.format}", keep_suffix=settings.keep_suffix)
    with folder.open():
        _check_output(folder, resume)  # again, now that no other process can change it
        workers = workers or min(8, os.cpu_count() or 1)
        kept: list[Record] = []
        if folder.exists:
            plan, kept = _resume(folder, identity, plan, workers)
        else:
            folder.write_plan(plan.items)
        folder.write_job({"settings": identity, "ignored": plan.ignored, "unreadable": plan.unreadable})
        run = _Run(translator, folder, settings, batch_size, workers, len(plan.items), kept, on_progress)
        start_s = time.perf_counter()
        done = {record.id for record in kept}
        try:
            run.run(item for item in plan.items if item.id not in done)
        except OSError as error:  # of writing: what cannot be read is quarantined
            raise ValueError(
                f"{error.filename2 or error.filename or output}: {error.strerror or error}; {run.finished} of {len(plan.items)} "
                "inputs are finished. Mend that, then go on with --resume"
            ) from error
    return Summary(
        total=len(plan.items),
        written=run.finished - run.quarantined - len(kept),
        kept=len(kept),
        quarantined=run.quarantined,
        ignored=len(plan.ignored),
        unreadable=len(plan.unreadable),
        seconds=time.perf_counter() - start_s,
        batch_size=run.batch_size,
    )


def _identity(translator: Translator, source: Path, settings: JobSettings) -> dict[str, Any]:
    """Everything the outputs depend on, as job.json has it."""
    limits = translator.backend.limits
    sampling = translator.settings(steps=settings.steps, guidance=settings.guidance, solver=settings.solver)
    size = settings.size or limits.native_size
    return {
        "input": str(source.resolve()),
        "model": translator.backend.fingerprint,
        "backend": translator.backend.name,
        "dtype": str(limits.dtype).removeprefix("torch."),
        **asdict(settings),
        **asdict(sampling),
        "size": list(size) if isinstance(size, tuple) else size,
    }


def _check_output(folder: JobFolder, resume: bool) -> None:
    if folder.path.exists() and not folder.path.is_dir():
        raise ValueError(f"{folder.path} is a file; wanted a folder for the outputs")
    if folder.exists and not resume:
        raise ValueError(f"{folder.path} holds a job already. Add --resume to go on with it, or choose another output folder")
    # plan.jsonl alone is what a kill leaves between planning and the first image
    if not folder.exists and folder.path.is_dir() and set(os.listdir(folder.path)) - {WORK_FOLDER, "plan.jsonl"}:
        raise ValueError(f"{folder.path} is not empty and holds no job of clipdit. Choose another output folder")


def _resume(folder: JobFolder, identity: dict[str, Any], now: Plan, workers: int) -> tuple[Plan, list[Record]]:
    """The plan with what is new in the input, and the records that need not be done again; the ledger is left with just these."""
    for name, before in folder.read_job()["settings"].items():
        if identity.get(name) != before:
            raise ValueError(
                f"{folder.path} holds a job with {name} = {before}; now it is {identity.get(name)}. "
                "Use the same, or another output folder"
            )
    planned = {item.id: item for item in folder.read_plan()}
    fresh = [item for item in now.items if item.id not in planned]
    for item in now.items:
        before = planned.get(item.id, item)
        for name in ("output", "seed"):
            if getattr(item, name) != getattr(before, name):
                raise ValueError(
                    f"{folder.path} holds a job in which {item.id} has {name} {getattr(before, name)}; now it is "
                    f"{getattr(item, name)}. Use another output folder"
                )
    plan = Plan(items=[*planned.values(), *fresh], ignored=now.ignored, unreadable=now.unreadable)
    if fresh:
        check(plan, folder.path)
        folder.write_plan(plan.items)

    records, readable = folder.read_ledger()
    written = {record.id: record for record in records if record.status == "written" and record.id in planned}
    with ThreadPoolExecutor(workers) as pool:
        intact = pool.map(folder.is_intact, written.values())
        kept = [record for record, whole in zip(written.values(), intact, strict=True) if whole]
    if readable < folder.ledger_bytes or kept != records:
        folder.write_ledger(kept)
    logger.info(
        "going on with %s: %d of %d inputs are done%s",
        folder.path,
        len(kept),
        len(plan.items),
        f", {len(written) - len(kept)} outputs are gone or altered and are made again" if len(kept) < len(written) else "",
    )
    return plan, kept


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """An input on its way to the model."""

    item: Item
    image: UInt8[Tensor, "3 H W"]
    """Fitted."""
    placement: Placement
    notes: tuple[str, ...]
    ms: float


class _Run:
    """One pass over inputs; `finished` and `quarantined` count what is in the ledger."""

    def __init__(
        self,
        translator: Translator,
        folder: JobFolder,
        settings: JobSettings,
        batch_size: int,
        workers: int,
        total: int,
        kept: list[Record],
        on_progress: Callable[[Progress], None] | None,
    ):
        self.translator, self.folder, self.settings = translator, folder, settings
        self.batch_size, self.total, self.on_progress = batch_size, total, on_progress
        self.ahead = AHEAD_BATCHES * batch_size + workers
        self.finished, self.quarantined = len(kept), 0
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
            image, placement = self.translator.fit(decoded.pixels, self.settings.size, self.settings.fit)
        except _IMAGE_ERRORS as error:
            reason = error.reason if isinstance(error, ImageError) else str(error) or type(error).__name__
            return _quarantine(item, reason, _ms_since(start_s))
        return _Ready(item=item, image=image, placement=placement, notes=decoded.notes, ms=_ms_since(start_s))

    def _reject(self, record: Record) -> None:
        logger.warning("%s: %s", record.id, record.reason)
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
        settings = self.settings
        try:
            return self.translator(
                torch.stack([ready.image for ready in chunk]),
                seeds=[ready.item.seed for ready in chunk],
                steps=settings.steps,
                guidance=settings.guidance,
                solver=settings.solver,
            )
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
