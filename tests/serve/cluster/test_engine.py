"""The engine of an ingress, with replicas in this process that live, refuse and die as told."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from serving import Gate, Identity, number_of, numbered, until

from clipdit_serve.cluster.sizes import Sizes, check_jobs
from clipdit_serve.engine import BatchReport, Task
from clipdit_serve.errors import ApiError
from clipdit_serve.settings import ServeSettings

pytest.importorskip("ray.serve")
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from clipdit_serve.cluster import engine as engine_module
from clipdit_serve.cluster import model
from clipdit_serve.cluster.engine import RayEngine
from clipdit_serve.cluster.model import ModelReplica

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica takes over the log of its process, which is ours here."""
    monkeypatch.setattr(model, "log_to_stderr", lambda json: None)


class Response:
    """Of a call, as a `DeploymentResponse` is: awaited, or cancelled."""

    def __init__(self, work: Any):
        self._task = asyncio.ensure_future(work)
        self.cancel = self._task.cancel

    def __await__(self):
        return self._task.__await__()


class Question:
    """How the replica of a handle is."""

    def __init__(self, handle: "Handle"):
        self._handle = handle

    def remote(self, *given: Any) -> Response:
        return Response(self.tell(*given))

    async def tell(self, *given: Any) -> Any:
        handle = self._handle
        if handle.silent:
            await asyncio.sleep(60)
        assert handle.replica is not None
        answer = await handle.replica.condition(*given)
        if handle.late:
            raise TimeoutError
        return answer


class Handle:
    """Of a deployment with one replica. `silent`: it does not say how it is. `late`: it says so, and nobody waits any more.

    Args:
        errors: raised by the first calls of `ask`, one each.
    """

    def __init__(self, replica: ModelReplica | None, errors: list[Exception] | None = None):
        self.replica, self.errors, self.asked = replica, errors or [], 0
        self.silent = self.late = False
        self.ask, self.condition = self, Question(self)

    def options(self, **options: Any) -> "Handle":
        return self

    def remote(self, sent: Any) -> Response:
        return Response(self._ask(sent))

    async def _ask(self, sent: Any) -> Any:
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)
        assert self.replica is not None
        return await self.replica.ask(sent)

    def broadcast(self, method: str, *given: Any) -> "Handle":
        self._given = given
        return self

    async def results_async(self, **options: Any) -> list:
        if self.replica is None:
            raise DeploymentUnavailableError(None)
        return [await self.condition.tell(*self._given)]


async def started(
    open_model: Callable,
    settings: ServeSettings | None = None,
    errors: list[Exception] | None = None,
    on_batch: Callable[[BatchReport], None] = lambda report: None,
) -> tuple[RayEngine, Handle]:
    settings = settings or ServeSettings(max_wait_ms=5)
    handle = Handle(await _replica(open_model, settings), errors)
    engine = RayEngine(handle, Sizes(), settings)
    engine.start(on_batch)
    await until(lambda: engine.health().state == "ready")
    return engine, handle


async def _replica(open_model: Callable, settings: ServeSettings) -> ModelReplica:
    replica = ModelReplica.__new__(ModelReplica)
    await replica.__init__(open_model, settings, json=False)  # as Ray does
    replica._watching.cancel()  # it would end this process
    return replica


async def ask(engine: RayEngine, number: int) -> torch.Tensor:
    with engine.admit():
        return (await engine.translate(Task(image=numbered(number), seed=number))).image


async def test_an_answer_comes_back_with_its_own_image():
    engine, _ = await started(Identity)
    images = await asyncio.gather(*(ask(engine, number) for number in range(20)))
    assert [number_of(image) for image in images] == list(range(20))
    assert engine.idle
    engine.close()


async def test_a_task_whose_replica_died_is_sent_once_more_and_no_more_than_that():
    engine, handle = await started(Identity, errors=[ActorDiedError()])
    assert number_of(await ask(engine, 5)) == 5
    assert handle.asked == 2
    handle.errors = [ActorDiedError(), ActorDiedError()]
    with pytest.raises(ApiError) as caught:
        await ask(engine, 6)
    assert (caught.value.code, caught.value.retry_after_s, handle.asked) == ("model_unavailable", 5, 4)
    engine.close()


async def test_a_replica_that_is_full_is_queue_full_and_a_bad_task_is_the_callers_mistake():
    class Picky(Identity):
        def settings(self, **sampling):
            if sampling.get("steps") == 7:
                raise ValueError("steps is 7; this one takes 4")
            return super().settings(**sampling)

    engine, handle = await started(Picky, errors=[BackPressureError(1, 1)])
    with pytest.raises(ApiError) as caught:
        await ask(engine, 5)
    assert (caught.value.code, caught.value.retry_after_s, handle.asked) == ("queue_full", 1, 1)
    with pytest.raises(ApiError, match="steps is 7; this one takes 4") as caught:
        await engine.translate(Task(image=numbered(1), seed=1, steps=7))
    assert (caught.value.code, caught.value.param) == ("invalid_value", "steps")
    engine.close()


async def test_no_more_are_admitted_than_queue_and_batches_hold():
    gate = Gate()
    engine, _ = await started(lambda: Identity(before=gate), ServeSettings(queue=3, max_batch=2, max_wait_ms=0))
    asking = [asyncio.create_task(ask(engine, number)) for number in range(5)]
    await until(gate.reached.is_set)
    with pytest.raises(ApiError) as caught:
        await ask(engine, 9)
    assert caught.value.code == "queue_full" and caught.value.retry_after_s >= 1
    gate.opened.set()
    assert [number_of(image) for image in await asyncio.gather(*asking)] == list(range(5))
    engine.close()


async def test_a_caller_who_leaves_takes_his_image_out_of_the_replicas_queue():
    gate = Gate()
    identity = Identity(before=gate)
    engine, handle = await started(lambda: identity, ServeSettings(max_batch=1, max_wait_ms=0))
    first = asyncio.create_task(ask(engine, 1))
    await until(gate.reached.is_set)
    second = asyncio.create_task(ask(engine, 2))
    await until(lambda: handle.replica._engine.health().waiting == 1)
    second.cancel()
    await until(lambda: handle.replica._engine.health().waiting == 0)
    gate.opened.set()
    assert number_of(await first) == 1
    assert identity.batches == [1] and engine.idle
    engine.close()


async def test_readiness_ends_when_no_replica_says_that_it_can_answer():
    engine, handle = await started(Identity)
    replica, handle.replica = handle.replica, None
    await until(lambda: engine.health().state == "hung", within_s=3)
    with pytest.raises(ApiError) as caught:
        await ask(engine, 1)
    assert caught.value.code == "model_unavailable"
    handle.replica = replica
    await until(lambda: engine.health().state == "ready")
    engine.drain()
    with pytest.raises(ApiError) as caught:
        await ask(engine, 1)
    assert caught.value.code == "draining"
    engine.close()


async def test_an_ingress_that_stood_still_does_not_blame_the_models(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_module, "VALID_S", 3.0)
    engine, handle = await started(Identity)
    time.sleep(6)  # as where thousands ask at once
    assert engine.health().state == "ready"
    handle.silent = True
    await until(lambda: engine.health().state == "hung", within_s=20)
    engine.close()


async def test_every_batch_is_told_of_once_though_answers_come_too_late_and_others_ask():
    reports: list[BatchReport] = []
    engine, handle = await started(Identity, on_batch=reports.append)
    replica = handle.replica
    assert replica is not None

    async def translate(*numbers: int) -> None:
        for number in numbers:
            await replica._engine.translate(Task(image=numbered(number), seed=number))

    await translate(1, 2)
    await until(lambda: len(reports) == 2)
    handle.late = True
    await translate(3, 4, 5)
    await asyncio.sleep(1)  # some looks, whose answers nobody reads
    assert len(reports) == 2
    assert (await replica.condition("another ingress", {})).reports == ()  # they are owed to the first
    await translate(6)
    handle.late = False
    await until(lambda: len(reports) == 6)
    await translate(7)
    await until(lambda: len(reports) == 7)
    await asyncio.sleep(1)
    assert len(reports) == 7 and sum(report.images for report in reports) == 7
    engine.close()


def test_bounds_follow_from_queue_batch_and_numbers():
    settings = ServeSettings(queue=64, max_batch=8, max_jobs=0)
    sizes = Sizes(models=4, ingresses=3)
    assert sizes.admitted(settings) == 32  # (64 + 4 * 8) / 3
    assert sizes.model_ongoing(settings) == 96
    with pytest.raises(ValueError, match="--replicas is 0; wanted 1 or more"):
        Sizes(models=0)
    with pytest.raises(ValueError, match="--ingress-replicas 3 cannot keep jobs"):
        check_jobs(sizes, ServeSettings())
    check_jobs(sizes, settings)
    check_jobs(Sizes(), ServeSettings())
