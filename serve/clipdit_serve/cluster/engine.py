"""The engine of an ingress: it asks model replicas, and knows how they are without asking.

What is pure can be asked twice: a task whose replica died is sent once more, to another one.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from clipdit_serve.cluster.awake import AwakeClock
from clipdit_serve.cluster.sizes import Sizes
from clipdit_serve.cluster.wire import Condition, Refusal, SentAnswer, SentTask
from clipdit_serve.engine import Answer, BatchReport, Health, ModelInfo, State, Task
from clipdit_serve.errors import ApiError
from clipdit_serve.pace import whole_seconds
from clipdit_serve.settings import ServeSettings

logger = logging.getLogger(__name__)

LOOKS_EVERY_S = 0.25
"""At the replicas."""

ANSWERS_WITHIN_S = 2.0
"""A replica that has not said by then how it is counts as one that cannot answer; on a busy machine one second is too short."""

VALID_S = 4.5
"""What was seen says nothing any more after so long: then readiness ends. Five are promised. Of time in which we could look: see
awake.py."""

ASLEEP_S = 0.5
"""A look that found nobody counts for nothing when our own loop stood still for longer than this meanwhile."""

SAID: dict[State, str] = {
    "ready": "ready",
    "loading": "models are being loaded and warmed up; come again in a few seconds",
    "draining": "the service shuts down; try another one",
    "hung": "no model replica answers; others are being started",
}


class Lost(Exception):
    """A replica ended before it answered."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """How the replicas were."""

    at_s: float
    conditions: tuple[Condition, ...] = ()

    @property
    def ready(self) -> int:
        """Replicas that can answer."""
        return sum(condition.health.state == "ready" for condition in self.conditions)

    @property
    def waiting(self) -> int:
        return sum(condition.health.waiting for condition in self.conditions)

    @property
    def running(self) -> int:
        return sum(condition.health.running for condition in self.conditions)

    @property
    def batch_s(self) -> float:
        """Mean seconds of a batch; 0 as long as nothing is known."""
        times_ms = [float(c.health.details["batch_ms"]) for c in self.conditions if "batch_ms" in c.health.details]
        return sum(times_ms) / len(times_ms) / 1000 if times_ms else 0.0


class _Ticket:
    """One image that was sent, as whoever sent it sees it."""

    def __init__(self, engine: "RayEngine", task: Task, on_start: Callable[[], None]):
        self._engine, self._on_start = engine, on_start
        self._waits = True
        self._work = asyncio.create_task(engine.follow(task, self._start))
        self._work.add_done_callback(lambda work: engine.waiting.pop(self, None))

    def _start(self) -> None:
        self._engine.waiting.pop(self, None)
        if self._waits:  # and was not sent a second time
            self._waits = False
            self._on_start()

    @property
    def place(self) -> int | None:
        return next((place for place, ticket in enumerate(self._engine.waiting, 1) if ticket is self), None)

    async def answer(self) -> Answer:
        try:
            return await asyncio.shield(self._work)
        except asyncio.CancelledError:
            self.leave()
            raise

    def leave(self) -> None:
        self._work.cancel()


class RayEngine:
    """An `Engine` whose models are replicas of a deployment of `ModelReplica`.

    Args:
        models: of that deployment.
    """

    def __init__(self, models: DeploymentHandle, sizes: Sizes, settings: ServeSettings):
        self._models, self._sizes, self._settings = models, sizes, settings
        self._streaming: Any = models.options(stream=True)
        self._awake = AwakeClock()
        self._seen = Seen(at_s=-float("inf"))
        self._model_info: ModelInfo | None = None
        self._admitted, self._most = 0, sizes.admitted(settings)
        self._draining = False
        self._looking: asyncio.Task | None = None
        self._name, self._had = uuid4().hex, dict[str, int]()  # by replica: the last of its reports that came here
        self._on_batch: Callable[[BatchReport], None] = lambda report: None
        self.waiting: dict[_Ticket, None] = {}
        """Tickets of images that are not in a model yet, oldest first."""

    @property
    def model(self) -> ModelInfo | None:
        return self._model_info

    def start(self, on_batch: Callable[[BatchReport], None]) -> None:
        self._on_batch = on_batch
        self._awake.start()
        self._looking = asyncio.create_task(self._look_again_and_again())

    def health(self) -> Health:
        """Waiting and running are of all replicas, whoever sent them what they do."""
        state, seen = self._state(), self._seen
        details: dict[str, float | int | str] = {
            "admitted": self._admitted,
            "max_batch": self._settings.max_batch,
            "replicas": self._sizes.models,
            "replicas_ready": seen.ready,
        }
        if seen.batch_s:
            details["batch_ms"] = round(1000 * seen.batch_s, 3)
        return Health(state=state, said=SAID[state], waiting=seen.waiting, running=seen.running, details=details)

    @contextmanager
    def admit(self) -> Iterator[None]:
        self._check_admission()
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    async def translate(self, task: Task) -> Answer:
        return await self._twice(lambda: self._ask(task))

    def submit(self, task: Task, on_start: Callable[[], None]) -> _Ticket:
        ticket = _Ticket(self, task, on_start)
        self.waiting[ticket] = None
        return ticket

    async def follow(self, task: Task, on_start: Callable[[], None]) -> Answer:
        """`translate`, and a word when the image gets into a model."""
        return await self._twice(lambda: self._stream(task, on_start))

    def reload(self) -> Future[ModelInfo]:
        """Of all replicas at the same time, each as `InProcessEngine` does it. Where some refuse, the others have the new model:
        the exception says how many."""
        return asyncio.run_coroutine_threadsafe(self._reload(), asyncio.get_running_loop())

    async def _reload(self) -> ModelInfo:
        with _as_ours():
            answers = await self._models.broadcast("reload").results_async(timeout_s=None, return_exceptions=True)
        models = [answer for answer in answers if isinstance(answer, ModelInfo)]
        if len(models) < len(answers) or not models:
            reasons = "; ".join(dict.fromkeys(str(answer) for answer in answers if not isinstance(answer, ModelInfo)))
            of_them = f"{len(answers) - len(models)} of {len(answers)} replicas: " if models else ""
            raise ValueError(f"{of_them}{reasons or 'there is no replica'}")
        self._model_info = models[0]
        return models[0]

    @property
    def idle(self) -> bool:
        return self._admitted == 0

    def drain(self) -> None:
        self._draining = True

    def close(self) -> None:
        self._draining = True
        if self._looking is not None:
            self._looking.cancel()
        self._awake.stop()

    # Asking

    async def _twice(self, ask: Callable) -> Answer:
        try:
            return await ask()
        except Lost as lost:
            logger.warning("a model replica was lost, and its task is sent once more: %s", lost)
        try:
            return await ask()
        except Lost as lost:
            raise self._refusal("hung") from lost

    async def _ask(self, task: Task) -> Answer:
        began_s = time.monotonic()
        with _as_ours():
            response = self._models.ask.remote(SentTask.of(task))
            try:
                return _answer_of(await response, began_s)
            except asyncio.CancelledError:
                response.cancel()
                raise

    async def _stream(self, task: Task, on_start: Callable[[], None]) -> Answer:
        began_s = time.monotonic()
        with _as_ours():
            messages = self._streaming.translate.remote(SentTask.of(task))
            try:
                async for message in messages:
                    if isinstance(message, SentAnswer | Refusal):
                        return _answer_of(message, began_s)
                    on_start()
            except asyncio.CancelledError:
                messages.cancel()
                raise
        raise Lost("it sent no answer")

    # Admission

    def _state(self) -> State:
        if self._draining:
            return "draining"
        if self._seen.ready and self._awake() - self._seen.at_s < VALID_S:
            return "ready"
        return "loading" if self._model_info is None else "hung"

    def _check_admission(self) -> None:
        state = self._state()
        if state != "ready":
            raise self._refusal(state)
        # those whom other ingresses admitted wait in the same queues; what was seen is a little old, what we admitted is not
        ahead = max(self._admitted, self._seen.waiting + self._seen.running)
        wait_s = -(-ahead // (self._settings.max_batch * self._seen.ready)) * self._seen.batch_s
        if self._admitted >= self._most or wait_s > self._settings.timeout_s:
            raise self._full(ahead, wait_s)

    @staticmethod
    def _full(ahead: int, wait_s: float) -> ApiError:
        seconds = whole_seconds(wait_s)
        return ApiError(
            "queue_full",
            f"{ahead} requests are in the queue or a model already; come again in {seconds} s",
            retry_after_s=seconds,
        )

    @staticmethod
    def _refusal(state: State) -> ApiError:
        return ApiError(state if state in ("loading", "draining") else "model_unavailable", SAID[state], retry_after_s=5)

    # Looking

    async def _look_again_and_again(self) -> None:
        while True:
            try:
                began_s, awake_s = time.monotonic(), self._awake()
                conditions = await self._look()
                asleep_s = (time.monotonic() - began_s) - (self._awake() - awake_s)
                if conditions or asleep_s < ASLEEP_S:
                    self._remember(conditions)
            except Exception as error:  # whatever it was: the next look may be luckier, and meanwhile we know nothing
                logger.error("the model replicas cannot be looked at: %s", error, exc_info=error)
            await asyncio.sleep(LOOKS_EVERY_S)

    async def _look(self) -> list[Condition]:
        """Every replica's, of those that say it."""
        try:
            asked = self._models.broadcast("condition", self._name, self._had)
            answers = await asked.results_async(timeout_s=ANSWERS_WITHIN_S, return_exceptions=True)
            return [answer for answer in answers if isinstance(answer, Condition)]
        except DeploymentUnavailableError:  # there is none
            return []
        except TimeoutError:  # one is silent; Ray sends a single question to one of those that are not
            return await self._look_at_one()

    async def _look_at_one(self) -> list[Condition]:
        response = self._models.condition.remote(self._name, self._had)
        try:
            async with asyncio.timeout(ANSWERS_WITHIN_S):
                return [await response]
        except (TimeoutError, RayActorError, RayServeException):
            response.cancel()
            return []

    def _remember(self, conditions: list[Condition]) -> None:
        self._seen = Seen(at_s=self._awake(), conditions=tuple(conditions))
        for condition in conditions:
            self._model_info = condition.model
            for number, report in condition.reports:
                if number > self._had.get(condition.replica, 0):
                    self._had[condition.replica] = number
                    self._on_batch(report)


def _answer_of(message: SentAnswer | Refusal, began_s: float) -> Answer:
    """ApiError where there is none; Lost where another replica may have one."""
    if isinstance(message, SentAnswer):
        return message.answer(time.monotonic() - began_s)
    if message.code in ("draining", "model_unavailable"):
        raise Lost(message.message)
    raise message.error()


@contextmanager
def _as_ours() -> Iterator[None]:
    """What Ray raises, as Lost or as a row of our table."""
    try:
        yield
    except BackPressureError as error:
        raise ApiError("queue_full", "too many requests wait already; come again in 1 s", retry_after_s=1) from error
    except TaskCancelledError as error:  # by Ray, as it ends the replica; a caller who left is another exception
        raise Lost(str(error)) from error
    except RayTaskError:
        raise  # a mistake of ours
    except (RayActorError, RayServeException) as error:
        raise Lost(str(error).partition("\n")[0]) from error
