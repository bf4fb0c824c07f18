"""The engine of one process: a queue, and one thread that owns the model from loading to release.

    event loop     admit -> a job in the queue -> await its future
    model thread   the oldest job, and those like it, up to max_batch or until the oldest has waited max_wait_ms -> one call

Jobs of a batch share size, steps and guidance. A job whose caller left is taken out of the queue there and then, so at most the
batch that runs already is wasted. When a batch fails, its halves are tried again: one bad image costs nobody else an answer, and
a batch that memory does not suffice for becomes smaller for good.

A reload starts a second thread, which opens and warms a model of its own. Between two batches the first hands it the queue and
releases its model: so batches never overlap, each model knows one thread, and for that time there are two in memory.
"""

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from clipdit.backend import Backend, OneCall, SamplingDefaults
from clipdit.shapes import ImageU8
from clipdit_serve.engine import Answer, BatchReport, Health, ModelInfo, State, Task
from clipdit_serve.errors import ApiError
from clipdit_serve.pace import Pace, whole_seconds
from clipdit_serve.reloading import check_limits
from clipdit_serve.settings import ServeSettings

logger = logging.getLogger(__name__)

SAID: dict[State, str] = {
    "ready": "ready",
    "loading": "the model is being loaded and warmed up; come again in a few seconds",
    "draining": "the service shuts down; try another one",
    "hung": "the model has not answered for too long; try another one",
    "dead": "the model's thread died; the service must be restarted",
}


class Model(Protocol):
    """What the thread calls; `clipdit.translator.Translator` is one."""

    @property
    def backend(self) -> Backend: ...

    def settings(self, **sampling: Any) -> SamplingDefaults: ...

    def __call__(self, source_u8: ImageU8, *, seeds: Sequence[int], **sampling: Any) -> ImageU8: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    task: Task
    on_start: Callable[[], None]
    arrived_s: float = field(default_factory=time.monotonic)
    future: Future[Answer] = field(default_factory=Future)

    def kind(self, defaults: SamplingDefaults) -> tuple:
        """Jobs of one kind may share a batch; who asks for the default, and who asks for nothing."""
        task = self.task
        steps = defaults.steps if task.steps is None else task.steps
        return (task.image.shape, steps, float(defaults.guidance if task.guidance is None else task.guidance))


@dataclass(kw_only=True, eq=False)
class _Keeper:
    """One model, as the thread sees it that owns it from loading to release."""

    pace: Pace
    max_batch: int
    most: int = 0
    """What `max_batch` was before memory was short."""
    info: ModelInfo | None = None
    running: list[_Job] = field(default_factory=list)
    outcome: Future[ModelInfo] = field(default_factory=Future)
    """Of the reload that it was made for."""
    thread: threading.Thread = field(init=False)


class _Abandoned(Exception):
    """A model that is being loaded is not wanted any more."""


class _Ticket:
    """A job as whoever submitted it sees it."""

    def __init__(self, job: _Job, queue: dict[int, _Job], changed: threading.Condition):
        self._job, self._queue, self._changed = job, queue, changed

    @property
    def place(self) -> int | None:
        with self._changed:
            return next((place for place, key in enumerate(self._queue, 1) if key == id(self._job)), None)

    async def answer(self) -> Answer:
        try:
            return await asyncio.wrap_future(self._job.future)
        except asyncio.CancelledError:
            self.leave()
            raise

    def leave(self) -> None:
        with self._changed:
            self._queue.pop(id(self._job), None)


class InProcessEngine:
    """An `Engine` whose model lives in a thread of this process.

    Args:
        open_model: called in the thread of the model that it opens, at the start and for each reload; may take its time.
        pace: of the first model; None is a new one.
    """

    def __init__(self, open_model: Callable[[], Model], settings: ServeSettings, *, pace: Pace | None = None):
        self._open_model, self._settings = open_model, settings
        self._changed = threading.Condition()  # guards the queue, who serves it, and the flags below
        self._queue: dict[int, _Job] = {}  # by identity, oldest first: a caller who leaves is found at once
        self._admitted = 0
        self._draining = self._closing = self._warm = False
        self.failure: BaseException | None = None
        """What the thread died of whose model served."""
        self._on_batch: Callable[[BatchReport], None] = lambda report: None
        self._keepers: list[_Keeper] = []  # whose threads may be there still
        self._serving = self._new_keeper(pace)
        self._coming: _Keeper | None = None  # from the call of a reload to its outcome
        self._successor: _Keeper | None = None  # the same, from the end of its warm-up

    # What the event loop calls

    @property
    def model(self) -> ModelInfo | None:
        return self._serving.info

    def start(self, on_batch: Callable[[BatchReport], None]) -> None:
        self._on_batch = on_batch
        self._serving.thread.start()

    def health(self) -> Health:
        state, serving = self._state(), self._serving
        details: dict[str, float | int | str] = {"admitted": self._admitted, "max_batch": serving.max_batch}
        if (batch_s := serving.pace.batch_s) is not None:
            details["batch_ms"] = round(1000 * batch_s, 3)
        return Health(state=state, said=SAID[state], waiting=len(self._queue), running=len(serving.running), details=details)

    @contextmanager
    def admit(self) -> Iterator[None]:
        self._check_admission()
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    async def translate(self, task: Task) -> Answer:
        return await self.submit(task, on_start=lambda: None).answer()

    def submit(self, task: Task, on_start: Callable[[], None]) -> _Ticket:
        job = _Job(task=task, on_start=on_start)
        with self._changed:
            if self._closing or not self._serving.thread.is_alive():
                raise self._refusal("dead" if not self._closing else "draining")
            self._queue[id(job)] = job
            self._changed.notify_all()
        return _Ticket(job, self._queue, self._changed)

    def reload(self) -> Future[ModelInfo]:
        keeper = self._new_keeper()
        state = self._state()
        if self._coming is not None or state in ("loading", "draining", "dead"):
            keeper.outcome.set_exception(ValueError(SAID[state] if self._coming is None else "another reload is under way"))
            return keeper.outcome
        self._coming = keeper
        keeper.outcome.set_running_or_notify_cancel()  # nobody can cancel it from here on
        keeper.thread.start()
        return keeper.outcome

    @property
    def idle(self) -> bool:
        return self._admitted == 0

    def drain(self) -> None:
        self._draining = True

    def close(self) -> None:
        self._draining = True
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for keeper in self._keepers:
            if keeper.thread.is_alive():
                keeper.thread.join(timeout=self._settings.hang_s)

    def _new_keeper(self, pace: Pace | None = None) -> _Keeper:
        keeper = _Keeper(pace=pace or Pace(hang_s=self._settings.hang_s), max_batch=self._settings.max_batch)
        # a daemon: a hung one must not keep us (and cli.script lets none be torn down)
        keeper.thread = threading.Thread(target=self._run, args=(keeper,), name="clipdit-model", daemon=True)
        self._keepers = [kept for kept in self._keepers if kept.thread.is_alive()] + [keeper]
        return keeper

    def _state(self) -> State:
        thread = self._serving.thread
        if not thread.is_alive():
            return "dead" if thread.ident is not None and not self._closing else "draining" if self._closing else "loading"
        if self._draining:
            return "draining"
        if not self._warm:
            return "loading"
        return "hung" if self._serving.pace.hangs_for_s() > 0 else "ready"

    def _check_admission(self) -> None:
        state = self._state()
        if state != "ready":
            raise self._refusal(state)
        settings, serving = self._settings, self._serving
        wait_s = serving.pace.wait_s(-(-self._admitted // serving.max_batch))
        if self._admitted >= settings.queue + serving.max_batch or wait_s > settings.timeout_s:
            raise ApiError(
                "queue_full",
                f"{self._admitted} requests are in the queue or the model already; come again in {whole_seconds(wait_s)} s",
                retry_after_s=whole_seconds(wait_s),
            )

    @staticmethod
    def _refusal(state: State) -> ApiError:
        code = state if state in ("loading", "draining") else "model_unavailable"
        return ApiError(code, SAID[state], retry_after_s=5)

    # What a model's thread does

    def _run(self, keeper: _Keeper) -> None:
        model = None
        try:
            model = self._open_model()
            self._describe(keeper, model)
            self._warm_up(keeper, model)
            self._take_over(keeper)
            while (jobs := self._next_batch(keeper)) is not None:
                for job in jobs:
                    job.on_start()
                self._answer(keeper, model, jobs)
                keeper.running = []
        except BaseException as error:  # whatever it was, callers are waiting
            self._give_up(keeper, error)
        finally:
            if model is not None:
                model.backend.close()
            if keeper is self._serving:
                self._refuse_the_rest(keeper)
            elif model is not None:  # the other one can use its memory
                del model
                if torch.cuda.is_initialized():
                    gc.collect()  # holds everybody up for 0.4 s; without it, cycles could hold a GPU's memory for long
                    torch.cuda.empty_cache()

    def _describe(self, keeper: _Keeper, model: Model) -> None:
        backend, limits = model.backend, model.backend.limits
        keeper.max_batch = keeper.most = min(self._settings.max_batch, limits.max_batch or self._settings.max_batch)
        keeper.info = ModelInfo(
            backend=backend.name,
            precision=str(limits.dtype).removeprefix("torch."),
            fingerprint=backend.fingerprint,
            limits=limits,
            defaults=model.settings(),
        )
        if keeper is not self._serving and self._serving.info is not None:
            check_limits(self._serving.info.limits, limits, self._settings.size)

    def _warm_up(self, keeper: _Keeper, model: Model) -> None:
        """Every size and, where batches are padded, every number of images that a later call could be the first of; and all
        files of the model that such a call reads: later on they may have been replaced."""
        limits, size = model.backend.limits, self._settings.size
        sizes = limits.sizes if size in ("nearest", "own") else [size] if isinstance(size, tuple) else None
        most = keeper.max_batch if self._pads(limits.device.type) else 1
        numbers = {self._padded(n, keeper.max_batch, limits.device.type) for n in range(1, most + 1)}
        calls = [(n, *size) for size in sizes or [limits.native_size] for n in sorted(numbers)]

        def call(number: int, height: int, width: int, *, more_steps: int = 0) -> None:
            if self._closing or (self._draining and keeper is not self._serving):
                raise _Abandoned(SAID["draining"])
            images = torch.zeros((number, 3, height, width), dtype=torch.uint8)
            settings = model.settings()
            settings = replace(settings, steps=settings.steps + more_steps)
            self._timed(keeper, model, images, [0] * number, settings)

        for sizes_of_call in calls:
            call(*sizes_of_call)
        if isinstance(model.backend, OneCall):  # what has a graph of the whole loop has others for any other number of steps
            for one_size in sorted({sizes_of_call[1:] for sizes_of_call in calls}):
                call(1, *one_size, more_steps=1)
        keeper.pace.forget()  # a first call says little about time
        call(*calls[0])
        call(*calls[-1])

    def _take_over(self, keeper: _Keeper) -> None:
        """Return when every later batch is this one's. _Abandoned when that cannot be any more."""
        if keeper is self._serving:
            self._warm = True
            return
        with self._changed:
            old, self._successor = self._serving, keeper
            self._changed.notify_all()
            while self._serving is not keeper:
                if self._closing or not old.thread.is_alive():
                    self._successor = None
                    raise _Abandoned(SAID["draining" if self._closing else "dead"])
                self._changed.wait(1.0)  # a thread that dies tells nobody
            self._coming = None
        assert keeper.info is not None
        keeper.outcome.set_result(keeper.info)

    def _give_up(self, keeper: _Keeper, error: BaseException) -> None:
        if keeper is self._serving:
            if isinstance(error, _Abandoned):
                return
            self.failure = error
            if self._warm or not isinstance(error, ValueError | OSError):  # those a user causes; whoever started us says them
                logger.critical("the model's thread died: %s", error or type(error).__name__, exc_info=error)
            return
        logger.debug("a reload failed", exc_info=error)
        with self._changed:
            self._coming = self._successor = None
            self._serving.max_batch = self._serving.most  # memory was short while there were two
        said = " ".join(str(error).split())
        expected = isinstance(error, ValueError | OSError | _Abandoned)
        # another exception: the traceback of this one holds the model
        keeper.outcome.set_exception(ValueError(said if expected and said else f"{type(error).__name__}: {said}"))

    def _pads(self, device: str) -> bool:
        wanted = self._settings.pad_batches
        return device == "cuda" if wanted is None else wanted

    def _padded(self, images: int, most: int, device: str) -> int:
        """How many images a call is made with."""
        return min(1 << (images - 1).bit_length(), most) if self._pads(device) else images

    def _next_batch(self, keeper: _Keeper) -> list[_Job] | None:
        """The oldest job and those of its kind, when there are enough of them or it has waited long enough. None when closing, or
        when another model serves from now on."""
        with self._changed:
            while True:
                if self._closing:
                    return None
                if self._successor is not None:
                    self._serving, self._successor = self._successor, None
                    self._changed.notify_all()
                    return None
                if not self._queue:
                    self._changed.wait()
                    continue
                oldest = next(iter(self._queue.values()))
                jobs = self._like(oldest, keeper)
                left_s = oldest.arrived_s + self._settings.max_wait_ms / 1000 - time.monotonic()
                if len(jobs) < keeper.max_batch and left_s > 0:
                    self._changed.wait(left_s)
                    continue
                for job in jobs:
                    del self._queue[id(job)]
                # from here on a caller who leaves cannot stop his job
                keeper.running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
                if keeper.running:
                    return keeper.running

    def _like(self, oldest: _Job, keeper: _Keeper) -> list[_Job]:
        assert keeper.info is not None
        jobs, defaults = [], keeper.info.defaults
        kind = oldest.kind(defaults)
        for job in self._queue.values():
            if job.kind(defaults) == kind:
                jobs.append(job)
                if len(jobs) == keeper.max_batch:
                    break
        return jobs

    def _answer(self, keeper: _Keeper, model: Model, jobs: list[_Job]) -> None:
        """Each job gets its image or its error. Raises what no job can be blamed for."""
        task, began_s = jobs[0].task, time.monotonic()
        try:
            sampling = model.settings(steps=task.steps, guidance=task.guidance)
        except ValueError as error:
            self._fail(jobs, ApiError("invalid_value", f"the model cannot be sampled so: {error}", param="steps"))
            return
        number = self._padded(len(jobs), keeper.max_batch, model.backend.limits.device.type)
        padded = [jobs[min(i, len(jobs) - 1)].task for i in range(number)]
        try:
            images, seconds = self._timed(
                keeper, model, torch.stack([t.image for t in padded]), [t.seed for t in padded], sampling
            )
        except Exception as error:  # whatever a backend raises: callers are waiting
            keeper.pace.abandon()
            if isinstance(error, torch.AcceleratorError):  # the device is lost to this process
                raise
            self._after_failure(keeper, model, jobs, error)
            return
        assert keeper.info is not None
        waits_s = tuple(began_s - job.arrived_s for job in jobs)
        for job, image, queue_s in zip(jobs, images[: len(jobs)], waits_s, strict=True):
            answer = Answer(
                image=image,
                sampling=sampling,
                fingerprint=keeper.info.fingerprint,
                queue_s=queue_s,
                model_s=seconds,
                batch=len(jobs),
            )
            job.future.set_result(answer)
        self._on_batch(BatchReport(images=len(jobs), seconds=seconds, waits_s=waits_s))

    def _timed(
        self, keeper: _Keeper, model: Model, images: ImageU8, seeds: list[int], sampling: SamplingDefaults
    ) -> tuple[ImageU8, float]:
        keeper.pace.begin(images[:, 0].numel() * sampling.steps * (2 if sampling.guidance != 1 else 1))
        outputs = model(images, seeds=seeds, steps=sampling.steps, guidance=sampling.guidance, solver=sampling.solver)
        return outputs, keeper.pace.end()

    def _after_failure(self, keeper: _Keeper, model: Model, jobs: list[_Job], error: Exception) -> None:
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if len(jobs) > 1:
            half = len(jobs) // 2
            if out_of_memory:
                keeper.max_batch = min(keeper.max_batch, half)
                logger.warning("out of memory with %d images at once; going on with %d", len(jobs), keeper.max_batch)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._answer(keeper, model, jobs[:half])
            self._answer(keeper, model, jobs[half:])
            return
        logger.error("the model failed: %s", error, exc_info=error)
        self._fail(jobs, ApiError("model_error", "the model failed on this image; the log says why"))

    def _fail(self, jobs: list[_Job], error: ApiError) -> None:
        for job in jobs:
            job.future.set_exception(error)

    def _refuse_the_rest(self, keeper: _Keeper) -> None:
        with self._changed:
            closing, left = self._closing, [*keeper.running, *self._queue.values()]
            self._queue.clear()
            keeper.running = []
        for job in left:
            if not job.future.done():
                job.future.set_exception(self._refusal("draining" if closing else "dead"))
