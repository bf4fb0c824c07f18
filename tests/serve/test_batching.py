"""The engine of one process, asked without HTTP."""

import asyncio
import threading

import pytest
import torch
from serving import Gate, Identity, number_of, numbered, until

from clipdit.fake_backend import FakeBackend
from clipdit.translator import Translator
from clipdit_serve.batching import InProcessEngine
from clipdit_serve.engine import Answer, BatchReport, Task
from clipdit_serve.errors import ApiError
from clipdit_serve.pace import Pace
from clipdit_serve.settings import ServeSettings

pytestmark = pytest.mark.anyio


class ThreeSeconds(Pace):
    """Every batch took three seconds."""

    @property
    def batch_s(self) -> float:
        return 3.0


async def started(
    model, settings: ServeSettings | None = None, reports: list[BatchReport] | None = None, pace: Pace | None = None
) -> InProcessEngine:
    engine = InProcessEngine(lambda: model, settings or ServeSettings(max_wait_ms=20), pace=pace)
    engine.start((reports if reports is not None else []).append)
    await until(lambda: engine.health().state == "ready")
    return engine


async def ask(engine: InProcessEngine, number: int, **sampling) -> Answer:
    with engine.admit():
        return await engine.translate(Task(image=numbered(number), seed=number, **sampling))


async def test_jobs_that_come_together_share_a_batch_and_each_gets_its_own_image():
    model, reports = Identity(), []
    engine = await started(model, reports=reports)
    answers = await asyncio.gather(*(ask(engine, number) for number in range(20)))
    assert [number_of(answer.image) for answer in answers] == list(range(20))
    assert model.batches == [8, 8, 4]
    assert [answer.batch for answer in answers] == [8] * 16 + [4] * 4
    assert [report.images for report in reports] == [8, 8, 4]
    engine.close()


async def test_only_jobs_of_the_same_size_steps_and_guidance_share_a_batch():
    gate = Gate()
    model = Identity(before=gate)
    engine = await started(model)
    first = asyncio.create_task(ask(engine, 1))
    await until(gate.reached.is_set)
    kinds = [{"steps": 2}, {"steps": 3}, {"guidance": 2.0}, {}, {"steps": 4, "guidance": 1}]  # the last two are one
    rest = [asyncio.create_task(ask(engine, 10 * i + j, **kind)) for i in range(3) for j, kind in enumerate(kinds)]
    small = Task(image=numbered(1)[:, :32, :32].contiguous(), seed=0)
    other_size = asyncio.create_task(engine.translate(small))
    await until(lambda: engine.health().waiting == 16)
    gate.opened.set()
    answers = await asyncio.gather(*rest)
    assert torch.equal((await other_size).image, small.image)
    await first
    assert [number_of(answer.image) for answer in answers] == [10 * i + j for i in range(3) for j in range(5)]
    assert sorted(zip(model.kinds, model.batches, strict=True)) == sorted(
        [
            (((3, 64, 64), 4, 1.0), 1),
            (((3, 64, 64), 2, 1.0), 3),
            (((3, 64, 64), 3, 1.0), 3),
            (((3, 64, 64), 4, 2.0), 3),
            (((3, 64, 64), 4, 1.0), 6),
            (((3, 32, 32), 4, 1.0), 1),
        ]
    )
    assert {answer.sampling.steps for answer in answers} == {2, 3, 4}
    engine.close()


async def test_an_image_is_what_the_translator_makes_of_it_in_whichever_batch():
    engine = await started(Translator(FakeBackend()))
    alone = Translator(FakeBackend())
    answers = await asyncio.gather(*(ask(engine, number) for number in range(11)))
    for number, answer in enumerate(answers):
        assert torch.equal(answer.image, alone(numbered(number)[None], seeds=[number])[0])
    engine.close()


@pytest.mark.parametrize(("pad", "wanted"), [(True, [1, 4, 8]), (False, [1, 3, 5]), (None, [1, 3, 5])])
async def test_batches_are_padded_to_powers_of_two_when_asked_to(pad: bool | None, wanted: list[int]):
    """None: on CUDA only, and this is a CPU."""
    model = Identity()
    engine = await started(model, ServeSettings(pad_batches=pad, max_wait_ms=20))
    for count in (1, 3, 5):
        answers = await asyncio.gather(*(ask(engine, number) for number in range(count)))
        assert [number_of(answer.image) for answer in answers] == list(range(count))
        assert {answer.batch for answer in answers} == {count}
    assert model.batches == wanted
    engine.close()


async def test_no_batch_is_larger_than_the_backend_takes():
    model = Identity(max_batch=3)
    engine = await started(model, ServeSettings(max_batch=8, max_wait_ms=20, pad_batches=True))
    await asyncio.gather(*(ask(engine, number) for number in range(7)))
    assert model.batches == [3, 3, 1]
    engine.close()


async def test_one_image_that_the_model_fails_on_costs_nobody_else_an_answer():
    def fail_on_5(images: torch.Tensor) -> None:
        if any(torch.equal(image, numbered(5)) for image in images):
            raise RuntimeError("not this one")

    engine = await started(Identity(before=fail_on_5))
    answers = await asyncio.gather(*(ask(engine, number) for number in range(8)), return_exceptions=True)
    assert isinstance(answers[5], ApiError) and answers[5].code == "model_error"
    assert [number_of(a.image) for a in answers if isinstance(a, Answer)] == [0, 1, 2, 3, 4, 6, 7]
    assert engine.health().state == "ready"
    engine.close()


async def test_a_ticket_knows_its_place_is_told_of_its_start_once_and_can_be_given_back():
    gate = Gate()

    def fail_together(images: torch.Tensor) -> None:
        gate(images)
        if len(images) > 1:
            raise ValueError("one by one, please")

    engine = await started(Identity(before=fail_together), ServeSettings(max_wait_ms=0))
    starts: list[int] = []

    def submit(number: int):
        return engine.submit(Task(image=numbered(number), seed=number), lambda: starts.append(number))

    first = submit(1)
    await until(gate.reached.is_set)
    second, third, fourth = submit(2), submit(3), submit(4)
    assert [ticket.place for ticket in (first, second, third, fourth)] == [None, 1, 2, 3]
    third.leave()
    assert [ticket.place for ticket in (second, third, fourth)] == [1, None, 2]
    gate.opened.set()
    answers = [await ticket.answer() for ticket in (first, second, fourth)]
    assert [number_of(answer.image) for answer in answers] == [1, 2, 4]
    assert starts == [1, 2, 4]  # although the batch of the last two was tried again in halves
    engine.close()


async def test_out_of_memory_halves_the_batches_for_good_and_loses_nothing():
    def at_most_3(images: torch.Tensor) -> None:
        if len(images) > 3:
            raise torch.OutOfMemoryError("out of memory")

    model = Identity(before=at_most_3)
    engine = await started(model)
    answers = await asyncio.gather(*(ask(engine, number) for number in range(16)))
    assert [number_of(answer.image) for answer in answers] == list(range(16))
    assert model.batches == [8, 4, 2, 2, 4, 2, 2, *[2] * 4]
    assert engine.health().details["max_batch"] == 2
    engine.close()


async def test_settings_that_the_model_cannot_take_are_the_callers_mistake():
    class Picky(Identity):
        def settings(self, **sampling):
            if sampling.get("steps") == 7:
                raise ValueError("steps is 7; this one takes 4")
            return super().settings(**sampling)

    engine = await started(Picky())
    with pytest.raises(ApiError, match="steps is 7; this one takes 4") as caught:
        await ask(engine, 1, steps=7)
    assert caught.value.code == "invalid_value"
    assert number_of((await ask(engine, 2)).image) == 2
    engine.close()


async def test_a_full_queue_refuses_with_the_time_that_its_batches_took():
    gate = Gate()
    engine = await started(Identity(before=gate), ServeSettings(queue=4, max_batch=2), pace=ThreeSeconds(hang_s=100))
    asking = [asyncio.create_task(ask(engine, number)) for number in range(6)]
    await until(lambda: engine.health().waiting == 4)
    with pytest.raises(ApiError, match="6 requests are in the queue or the model already") as caught:
        await ask(engine, 99)
    assert caught.value.code == "queue_full"
    assert caught.value.retry_after_s == 9  # three batches of two, three seconds each
    gate.opened.set()
    await asyncio.gather(*asking)
    engine.close()


async def test_what_could_not_be_answered_in_time_is_refused_at_once():
    gate = Gate()
    engine = await started(
        Identity(before=gate), ServeSettings(queue=50, max_batch=1, timeout_s=10), pace=ThreeSeconds(hang_s=100)
    )
    asking = [asyncio.create_task(ask(engine, number)) for number in range(4)]
    await until(lambda: engine.health().waiting == 3)
    with pytest.raises(ApiError, match="come again in 12 s"):
        await ask(engine, 99)
    gate.opened.set()
    await asyncio.gather(*asking)
    engine.close()


async def test_readiness_is_false_within_5_seconds_of_a_hanging_model_and_true_again_when_it_goes_on():
    gate = Gate()
    engine = await started(Identity(before=gate), ServeSettings(hang_s=0.5))
    asking = asyncio.create_task(ask(engine, 1))
    await until(lambda: engine.health().state == "hung", within_s=5)
    with pytest.raises(ApiError) as caught:
        await ask(engine, 2)
    assert caught.value.code == "model_unavailable"
    gate.opened.set()
    assert number_of((await asking).image) == 1
    await until(lambda: engine.health().state == "ready", within_s=1)
    engine.close()


@pytest.mark.parametrize("how", [SystemExit, KeyboardInterrupt, torch.AcceleratorError])
async def test_when_the_models_thread_dies_everybody_is_told_and_readiness_is_false(how: type[BaseException]):
    gate = Gate()

    def die(images: torch.Tensor) -> None:
        gate(images)
        raise how("gone")

    engine = await started(Identity(before=die))
    asking = [asyncio.create_task(ask(engine, 0))]
    await until(gate.reached.is_set)
    asking += [asyncio.create_task(ask(engine, number)) for number in range(1, 12)]
    await until(lambda: engine.health().waiting == 11)
    gate.opened.set()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert [answer.code for answer in answers if isinstance(answer, ApiError)] == ["model_unavailable"] * 12
    await until(lambda: engine.health().state == "dead", within_s=1)
    assert engine.idle
    with pytest.raises(ApiError):
        await ask(engine, 2)


async def test_a_model_that_cannot_be_opened_is_dead_and_says_why():
    def fail():
        raise ValueError("no such folder")

    engine = InProcessEngine(fail, ServeSettings())
    engine.start(lambda report: None)
    await until(lambda: engine.health().state == "dead")
    assert str(engine.failure) == "no such folder"


async def test_nobody_is_admitted_before_the_warm_up_is_over():
    loaded = threading.Event()

    def slowly():
        assert loaded.wait(10)
        return Identity()

    engine = InProcessEngine(slowly, ServeSettings())
    engine.start(lambda report: None)
    with pytest.raises(ApiError) as caught, engine.admit():
        pass
    assert (caught.value.code, engine.health().state, engine.model) == ("loading", "loading", None)
    loaded.set()
    await until(lambda: engine.health().state == "ready")
    assert engine.model is not None and engine.model.backend == "fake"
    engine.close()


async def test_while_draining_nobody_is_admitted_and_who_was_is_answered():
    gate = Gate()
    engine = await started(Identity(before=gate))
    asking = [asyncio.create_task(ask(engine, number)) for number in range(12)]
    await until(gate.reached.is_set)
    engine.drain()
    assert engine.health().state == "draining" and not engine.idle
    with pytest.raises(ApiError) as caught:
        await ask(engine, 99)
    assert caught.value.code == "draining"
    gate.opened.set()
    assert [number_of((await task).image) for task in asking] == list(range(12))
    assert engine.idle
    engine.close()
    assert engine.health().state == "draining"
