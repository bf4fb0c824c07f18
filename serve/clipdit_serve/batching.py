"""The engine of one process: a queue, and one thread that owns the model from loading to release.

    event loop     admit -> a job in the queue -> await its future
    model thread   the oldest job, and those like it, up to max_batch or until the oldest has waited max_wait_ms -> one call

Jobs of a batch share size, steps and guidance. A job whose caller left is taken out of the queue there and then, so at most the
batch that runs already is wasted. When a batch fails, its halves are tried again: one bad image costs nobody else an answer, and
a batch that memory does not suffice for becomes smaller for good.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from clipdit.backend import Backend, SamplingDefaults
from clipdit.shapes import ImageU8
from clipdit_serve.engine import Answer, BatchReport, Health, ModelInfo, State, Task
from clipdit_serve.errors import ApiError
from clipdit_serve.pace import Pace, whole_seconds
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

    @property
    def kind(self) -> tuple:
        """Jobs of one kind may share a batch."""
        return (self.task.image.shape, self.task.steps, self.task.guidance)


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
        open_model: called once, in that thread; may take its time.
        pace: None is a new one.
    """

    def __init__(self, open_model: Callable[[], Model], settings: ServeSettings, *, pace: Pace | None = None):
        self._open_model, self._settings = open_model, settings
        self._pace = pace or Pace(hang_s=settings.hang_s)
        self._changed = threading.Condition()  # guards the queue and the flags below
        self._queue: dict[int, _Job] = {}  # by identity, oldest first: a caller who leaves is found at once
        self._running: list[_Job] = []
        self._admitted = 0
        self._draining = self._closing = self._warm = False
        self.failure: BaseException | None = None
        """What the model's thread died of."""
        self._model_info: ModelInfo | None = None
        self._max_batch = settings.max_batch
        self._on_batch: Callable[[BatchReport], None] = lambda report: None
        self._thread = threading.Thread(target=self._run, name="clipdit-model", daemon=True)  # a hung one must not keep us

    # What the event loop calls

    @property
    def model(self) -> ModelInfo | None:
        return self._model_info

    def start(self, on_batch: Callable[[BatchReport], None]) -> None:
        self._on_batch = on_batch
        self._thread.start()

    def health(self) -> Health:
        state = self._state()
        details: dict[str, float | int | str] = {"admitted": self._admitted, "max_batch": self._max_batch}
        if self._pace.batch_s is not None:
            details["batch_ms"] = round(1000 * self._pace.batch_s, 3)
        return Health(state=state, said=SAID[state], waiting=len(self._queue), running=len(self._running), details=details)

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
        assert self._model_info is not None, "whoever is admitted meets a model"
        defaults = self._model_info.defaults
        task = replace(  # so that who asks for the default shares a batch with who asks for nothing
            task,
            steps=defaults.steps if task.steps is None else task.steps,
            guidance=defaults.guidance if task.guidance is None else float(task.guidance),
        )
        job = _Job(task=task, on_start=on_start)
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise self._refusal("dead" if not self._closing else "draining")
            self._queue[id(job)] = job
            self._changed.notify()
        return _Ticket(job, self._queue, self._changed)

    @property
    def idle(self) -> bool:
        return self._admitted == 0

    def drain(self) -> None:
        self._draining = True

    def close(self) -> None:
        self._draining = True
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=self._settings.hang_s)

    def _state(self) -> State:
        if not self._thread.is_alive():
            return "dead" if self._thread.ident is not None and not self._closing else "draining" if self._closing else "loading"
        if self._draining:
            return "draining"
        if not self._warm:
            return "loading"
        return "hung" if self._pace.hangs_for_s() > 0 else "ready"

    def _check_admission(self) -> None:
        state = self._state()
        if state != "ready":
            raise self._refusal(state)
        settings = self._settings
        wait_s = self._pace.wait_s(-(-self._admitted // self._max_batch))
        if self._admitted >= settings.queue + self._max_batch or wait_s > settings.timeout_s:
            raise ApiError(
                "queue_full",
                f"{self._admitted} requests are in the queue or the model already; come again in {whole_seconds(wait_s)} s",
                retry_after_s=whole_seconds(wait_s),
            )

    @staticmethod
    def _refusal(state: State) -> ApiError:
        code = state if state in ("loading", "draining") else "model_unavailable"
        return ApiError(code, SAID[state], retry_after_s=5)

    # What the model's thread does

    def _run(self) -> None:
        model = None
        try:
            model = self._open_model()
            self._describe(model)
            self._warm_up(model)
            self._warm = True
            while (jobs := self._next_batch()) is not None:
                for job in jobs:
                    job.on_start()
                self._answer(model, jobs)
                self._running = []
        except BaseException as error:  # whatever it was, callers are waiting
            self.failure = error
            if self._warm or not isinstance(error, ValueError | OSError):  # those a user causes; whoever started us says them
                logger.critical("the model's thread died: %s", error or type(error).__name__, exc_info=error)
        finally:
            if model is not None:
                model.backend.close()
            self._refuse_the_rest()

    def _describe(self, model: Model) -> None:
        backend, limits = model.backend, model.backend.limits
        self._max_batch = min(self._settings.max_batch, limits.max_batch or self._settings.max_batch)
        self._model_info = ModelInfo(
            backend=backend.name,
            precision=str(limits.dtype).removeprefix("torch."),
            fingerprint=backend.fingerprint,
            limits=limits,
            defaults=model.settings(),
        )

    def _warm_up(self, model: Model) -> None:
        """Every size and, where batches are padded, every number of images that a later call could be the first of."""
        limits, size = model.backend.limits, self._settings.size
        sizes = limits.sizes if size == "nearest" else [size] if isinstance(size, tuple) else None
        most = self._max_batch if self._pads(limits.device.type) else 1
        numbers = {self._padded(n, limits.device.type) for n in range(1, most + 1)}
        calls = [(n, *size) for size in sizes or [limits.native_size] for n in sorted(numbers)]

        def call(number: int, height: int, width: int) -> None:
            images = torch.zeros((number, 3, height, width), dtype=torch.uint8)
            self._timed(model, images, [0] * number, model.settings())

        for sizes_of_call in calls:
            call(*sizes_of_call)
        self._pace.forget()  # a first call says little about time
        call(*calls[0])
        call(*calls[-1])

    def _pads(self, device: str) -> bool:
        wanted = self._settings.pad_batches
        return device == "cuda" if wanted is None else wanted

    def _padded(self, images: int, device: str) -> int:
        """How many images a call is made with."""
        return min(1 << (images - 1).bit_length(), self._max_batch) if self._pads(device) else images

    def _next_batch(self) -> list[_Job] | None:
        """The oldest job and those of its kind, when there are enough of them or it has waited long enough. None when closing."""
        with self._changed:
            while True:
                if self._closing:
                    return None
                if not self._queue:
                    self._changed.wait()
                    continue
                oldest = next(iter(self._queue.values()))
                jobs = self._like(oldest)
                left_s = oldest.arrived_s + self._settings.max_wait_ms / 1000 - time.monotonic()
                if len(jobs) < self._max_batch and left_s > 0:
                    self._changed.wait(left_s)
                    continue
                for job in jobs:
                    del self._queue[id(job)]
                # from here on a caller who leaves cannot stop his job
                self._running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
                if self._running:
                    return self._running

    def _like(self, oldest: _Job) -> list[_Job]:
        jobs, kind = [], oldest.kind
        for job in self._queue.values():
            if job.kind == kind:
                jobs.append(job)
                if len(jobs) == self._max_batch:
                    break
        return jobs

    def _answer(self, model: Model, jobs: list[_Job]) -> None:
        """Each job gets its image or its error. Raises what no job can be blamed for."""
        task, began_s = jobs[0].task, time.monotonic()
        try:
            sampling = model.settings(steps=task.steps, guidance=task.guidance)
        except ValueError as error:
            self._fail(jobs, ApiError("invalid_value", f"the model cannot be sampled so: {error}", param="steps"))
            return
        number = self._padded(len(jobs), model.backend.limits.device.type)
        padded = [jobs[min(i, len(jobs) - 1)].task for i in range(number)]
        try:
            images, seconds = self._timed(model, torch.stack([t.image for t in padded]), [t.seed for t in padded], sampling)
        except Exception as error:
            self._pace.abandon()
            if isinstance(error, torch.AcceleratorError):  # the device is lost to this process
                raise
            self._after_failure(model, jobs, error)
            return
        waits_s = tuple(began_s - job.arrived_s for job in jobs)
        for job, image, queue_s in zip(jobs, images[: len(jobs)], waits_s, strict=True):
            job.future.set_result(Answer(image=image, sampling=sampling, queue_s=queue_s, model_s=seconds, batch=len(jobs)))
        self._on_batch(BatchReport(images=len(jobs), seconds=seconds, waits_s=waits_s))

    def _timed(self, model: Model, images: ImageU8, seeds: list[int], sampling: SamplingDefaults) -> tuple[ImageU8, float]:
        self._pace.begin(images[:, 0].numel() * sampling.steps * (2 if sampling.guidance != 1 else 1))
        outputs = model(images, seeds=seeds, steps=sampling.steps, guidance=sampling.guidance, solver=sampling.solver)
        return outputs, self._pace.end()

    def _after_failure(self, model: Model, jobs: list[_Job], error: Exception) -> None:
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if len(jobs) > 1:
            half = len(jobs) // 2
            if out_of_memory:
                self._max_batch = min(self._max_batch, half)
                logger.warning("out of memory with %d images at once; going on with %d", len(jobs), self._max_batch)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._answer(model, jobs[:half])
            self._answer(model, jobs[half:])
            return
        logger.error("the model failed: %s", error, exc_info=error)
        self._fail(jobs, ApiError("model_error", "the model failed on this image; the log says why"))

    def _fail(self, jobs: list[_Job], error: ApiError) -> None:
        for job in jobs:
            job.future.set_exception(error)

    def _refuse_the_rest(self) -> None:
        with self._changed:
            closing, left = self._closing, [*self._running, *self._queue.values()]
            self._queue.clear()
            self._running = []
        for job in left:
            if not job.future.done():
                job.future.set_exception(self._refusal("draining" if closing else "dead"))
