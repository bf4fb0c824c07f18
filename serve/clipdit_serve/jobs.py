"""Jobs: translations that are asked for now and fetched later.

    accepted -> queued -> running -> done | failed | cancelled -> expired, forgotten, or gone with the process

A job takes one of the engine's places like a request that waits for its answer: it is refused, batched, drained and given up at
the same limits. Its upload is decoded before it is accepted: a bad one is refused there and then, and no upload is kept. What is
kept of a finished job is the model's output, and encoded when it is fetched: only then does the caller say in which format.

All of this happens in the thread of the event loop.
"""

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from clipdit_serve.engine import Ticket
from clipdit_serve.errors import ApiError
from clipdit_serve.pace import whole_seconds
from clipdit_serve.service import Ask, Prepared, Service, Translated
from clipdit_serve.tracing import Watch

logger = logging.getLogger(__name__)

Status = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happened to a job."""

    id: int
    """1, 2, 3 ..."""
    status: Status
    """Since then."""
    place: int | None
    """In the queue; None for a job that does not wait."""


class Job:
    """One translation. `Jobs` changes it; everybody may read it.

    Args:
        ask: what is wanted; its format has no meaning here.
        seed: the one that is used, drawn or asked for.
        size_bytes: of the pixels it holds.
    """

    def __init__(self, ask: Ask, *, seed: int, size_bytes: int):
        self.id = secrets.token_hex(16)
        self.ask, self.seed, self.size_bytes = ask, seed, size_bytes
        self.created_s = time.time()
        self.expires_s: float | None = None
        """Seconds since 1970; None before it is finished."""
        self.translated: Translated | None = None
        """Of a job that is done."""
        self.error: ApiError | None = None
        """Of a job that failed."""
        self.collected = False
        """Whether it is finished, and somebody came for the result or knows that there is none."""
        self.events: list[Event] = []
        self._ticket: Ticket | None = None
        self._happened = asyncio.Event()

    @property
    def status(self) -> Status:
        return self.events[-1].status

    @property
    def place(self) -> int | None:
        """In the engine's queue, now; 1 is the oldest. None when the job does not wait."""
        return None if self._ticket is None else self._ticket.place

    @property
    def finished(self) -> bool:
        return self.status not in ("queued", "running")

    def queue(self, ticket: Ticket) -> None:
        """Its image is in the queue."""
        self._ticket = ticket
        self.tell("queued", ticket.place)

    def start(self) -> None:
        """Its image is in the model."""
        if self.status == "queued":  # and was not cancelled while this call was on its way
            self.tell("running")

    def end(self, status: Status) -> None:
        """It is finished."""
        self._ticket = None  # which holds the upload's pixels
        self.tell(status)

    def tell(self, status: Status, place: int | None = None) -> None:
        """Everybody who follows it."""
        self.events.append(Event(id=len(self.events) + 1, status=status, place=place))
        self._happened.set()
        self._happened = asyncio.Event()

    async def follow(self, after: int, *, ping_s: float) -> AsyncIterator[Event | None]:
        """The events whose id is above `after`, those to come included, up to the one that ends the job. None whenever nothing
        happened for so many seconds."""
        while True:
            happened = self._happened
            for event in self.events[after:]:
                yield event
                after = event.id
            # whoever we told may have taken his time: look again before the end
            if after >= len(self.events):
                if self.finished:
                    return
                try:
                    async with asyncio.timeout(ping_s):
                        await happened.wait()
                except TimeoutError:
                    yield None


class Jobs:
    """The jobs of one process, in memory.

    Args:
        on_end: called with the status of each job that ends.
    """

    def __init__(self, service: Service, *, on_end: Callable[[Status], None] = lambda status: None):
        self._service, self._settings, self._on_end = service, service.settings, on_end
        self._jobs: dict[str, Job] = {}  # oldest first
        self._keys: dict[str, tuple[str, str]] = {}  # Idempotency-Key -> (job's id, digest of its content)
        self._tasks: dict[str, asyncio.Task[Translated]] = {}  # of the jobs that are not finished

    def __len__(self) -> int:
        return len(self._jobs)

    def get(self, id: str) -> Job:
        """ApiError (job_not_found)."""
        if id not in self._jobs:
            kept = f"{self._settings.job_keep_s:g} s"
            raise ApiError("job_not_found", f"there is no job {id[:64]}; finished ones are kept for {kept}", param="id")
        return self._jobs[id]

    def knows(self, key: str | None) -> bool:
        """Whether a job has this Idempotency-Key."""
        return key in self._keys

    def find(self, key: str | None, digest: str) -> Job | None:
        """The job that was made with this key. ApiError (idempotency_key_reused) when its content was another."""
        if key is None or key not in self._keys:
            return None
        id, content = self._keys[key]
        if content != digest:
            raise ApiError(
                "idempotency_key_reused",
                f"the key belongs to the job {id}, of another image or other fields; send a new key",
                param="Idempotency-Key",
            )
        return self._jobs[id]

    async def accept(self, image: bytes, ask: Ask, *, key: str | None, digest: str) -> Job:
        """A new job, in the queue; or the one that was made with this key meanwhile. ApiError where there can be none."""
        with ExitStack() as stack:
            engine = self._service.engines[ask.variant]
            stack.enter_context(engine.admit())
            prepared = await self._service.prepare(image, ask)
            # from here on nothing is awaited: a twin that came while we decoded is seen, and nobody else takes the room
            if (twin := self.find(key, digest)) is not None:
                return twin
            job = Job(ask, seed=prepared.task.seed, size_bytes=prepared.task.image.nbytes)
            self._make_room(job.size_bytes)
            watch = self._service.traces.watch()
            started = watch.on_start(partial(_call_in, asyncio.get_running_loop(), job.start))
            ticket = engine.submit(prepared.task, started)
            job.queue(ticket)
            task = asyncio.create_task(self._answer(ticket, prepared, watch))
            # not within the task: one that is cancelled before its first step never runs at all
            admission = stack.pop_all()
        self._jobs[job.id], self._tasks[job.id] = job, task
        if key is not None:
            self._keys[key] = job.id, digest

        def end(task: asyncio.Task[Translated]) -> None:
            ticket.leave()
            admission.close()
            self._end(job, task)

        task.add_done_callback(end)
        return job

    async def _answer(self, ticket: Ticket, prepared: Prepared, watch: Watch) -> Translated:
        try:
            async with self._service.deadline():
                with watch:
                    answer = await ticket.answer()
                    watch.answered(answer, self._service.engines[prepared.variant].model, prepared.variant)
                # a copy: an image of a batch keeps all the others of it in memory
                return Translated.of(prepared, replace(answer, image=answer.image.clone()))
        except TimeoutError:
            raise self._service.too_late() from None

    def _end(self, job: Job, task: asyncio.Task[Translated]) -> None:
        del self._tasks[job.id]
        job.expires_s = time.time() + self._settings.job_keep_s
        asyncio.get_running_loop().call_later(self._settings.job_keep_s, self.forget, job.id)
        status: Status = "done"
        if task.cancelled():
            status, job.collected = "cancelled", True
        elif (error := task.exception()) is not None:
            status = "failed"
            if not isinstance(error, ApiError):
                logger.error("job %s failed: %s", job.id, error, exc_info=error, extra={"job": job.id})
                error = ApiError("internal_error", f"a mistake of ours; the log has it under {job.id}")
            job.error = error
        else:
            job.translated = task.result()
        if status != "done":
            job.size_bytes = 0
        job.end(status)
        ms = round(1000 * (time.time() - job.created_s), 3)
        code = None if job.error is None else job.error.code
        logger.info("job %s", f"{status} {code}" if code else status, extra={"job": job.id, "error": code, "ms": ms})
        self._on_end(status)

    async def cancel(self, job: Job) -> None:
        """Its image leaves the queue; one that is in the model already is thrown away. A finished job is forgotten instead."""
        if job.finished:
            self.forget(job.id)
            return
        task = self._tasks[job.id]
        task.cancel()
        await asyncio.wait((task,))
        await asyncio.sleep(0)  # its end is written down by a callback, which runs before us

    def forget(self, id: str) -> None:
        """A finished job, if it is still there; its key can be used again."""
        if self._jobs.pop(id, None) is not None:
            self._keys = {key: kept for key, kept in self._keys.items() if kept[0] != id}

    def check_room(self, size_bytes: int = 0) -> None:
        """ApiError (too_many_jobs) where the jobs that nobody has come for yet leave no room for one more."""
        owed = [job for job in self._jobs.values() if not job.collected]
        if self._fits(owed, size_bytes):
            return
        expiries = [job.expires_s for job in owed if job.expires_s is not None]
        most = f"{self._settings.max_jobs} or {self._settings.max_jobs_bytes} bytes of pixels"
        raise ApiError(
            "too_many_jobs",
            f"{len(owed)} jobs wait for their results to be fetched; there is room for {most}. Fetch results, or delete jobs",
            retry_after_s=whole_seconds(min(expiries) - time.time()) if expiries else 1,
        )

    def _make_room(self, size_bytes: int) -> None:
        """For one more. Results that were fetched are given up for it, the oldest first; others never. ApiError
        (too_many_jobs)."""
        self.check_room(size_bytes)
        for job in [job for job in self._jobs.values() if job.collected]:
            if self._fits(self._jobs.values(), size_bytes):
                break
            self.forget(job.id)

    def _fits(self, jobs: Collection[Job], size_bytes: int) -> bool:
        """Whether there is room beside these."""
        held_bytes = sum(job.size_bytes for job in jobs)
        return len(jobs) < self._settings.max_jobs and held_bytes + size_bytes <= self._settings.max_jobs_bytes

    @property
    def settled(self) -> bool:
        """Whether somebody has come for the result of every job."""
        return all(job.collected for job in self._jobs.values())

    async def close(self) -> None:
        """Whatever is not finished is cancelled."""
        lost = sum(not job.collected for job in self._jobs.values())
        if lost:
            logger.warning("jobs that are lost, since nobody fetched their results in time: %d", lost)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    """From any thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends, and nobody follows the job any more
        loop.call_soon_threadsafe(function)


def digest_of(image: bytes, ask: Ask) -> str:
    """Same content, same digest, however it was sent."""
    return hashlib.sha256(f"{ask!r}\0".encode() + image).hexdigest()
