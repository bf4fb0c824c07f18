"""What the store of jobs promises, whoever asks it."""

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncIterator

import pytest
from serving import Gate, Identity, number_of, numbered, png, until

from clipdit_serve.batching import InProcessEngine
from clipdit_serve.errors import ApiError
from clipdit_serve.jobs import Job, Jobs, digest_of
from clipdit_serve.service import Ask, Service
from clipdit_serve.settings import ServeSettings

pytestmark = pytest.mark.anyio

ASK = Ask(variant="", seed=1, steps=None, guidance=None, format="png", quality=95)


@contextlib.asynccontextmanager
async def store(model: Identity, decoder, **settings) -> AsyncIterator[tuple[Jobs, InProcessEngine, list[str]]]:
    """(the jobs, their engine, the statuses with which jobs ended)."""
    given = ServeSettings(**settings)
    engine = InProcessEngine(lambda: model, given)
    engine.start(lambda report: None)
    await until(lambda: engine.health().state == "ready")
    ends: list[str] = []
    jobs = Jobs(Service(engine, decoder, given), on_end=ends.append)
    try:
        yield jobs, engine, ends
    finally:
        await jobs.close()
        engine.close()


async def accept(jobs: Jobs, number: int = 1, key: str | None = None) -> Job:
    image = png(numbered(number))
    return await jobs.accept(image, ASK, key=key, digest=digest_of(image, ASK))


async def statuses(job: Job, after: int = 0) -> list[str]:
    """Of its events, until it is finished."""
    return [event.status async for event in job.follow(after, ping_s=10) if event is not None]


async def test_a_job_tells_that_it_waits_where_runs_and_is_done(decoder):
    gate = Gate()
    async with store(Identity(before=gate), decoder, max_batch=1, max_wait_ms=0) as (jobs, _, ends):
        first = await accept(jobs, 1)
        await until(gate.reached.is_set)
        second, third = await accept(jobs, 2), await accept(jobs, 3)
        await until(lambda: first.status == "running")
        assert (first.place, second.place, third.place) == (None, 1, 2)
        assert [(e.id, e.status, e.place) for e in third.events] == [(1, "queued", 2)]
        gate.opened.set()
        for number, job in enumerate((first, second, third), 1):
            assert await statuses(job) == ["queued", "running", "done"]
            assert job.translated is not None and number_of(job.translated.answer.image) == number
    assert ends == ["done"] * 3


async def test_who_comes_late_or_comes_back_misses_no_event_and_sees_none_twice(decoder):
    gate = Gate()
    async with store(Identity(before=gate), decoder) as (jobs, _, _):
        job = await accept(jobs)
        follower = asyncio.create_task(statuses(job))
        await until(lambda: job.status == "running")
        late = asyncio.create_task(statuses(job, after=1))
        gate.opened.set()
        assert await follower == ["queued", "running", "done"]
        assert await late == ["running", "done"]
        assert await statuses(job, after=2) == ["done"]
        assert await statuses(job, after=3) == []


async def test_a_follower_who_is_slow_gets_the_last_event_all_the_same(decoder):
    gate = Gate()
    async with store(Identity(before=gate), decoder) as (jobs, _, _):
        job = await accept(jobs)
        found = []
        async for event in job.follow(0, ping_s=10):
            assert event is not None
            found.append(event.status)
            gate.opened.set()
            await until(lambda: job.finished)  # all that happens, happens while he holds the first event
    assert found == ["queued", "running", "done"]


async def test_silence_is_broken_by_pings(decoder):
    gate = Gate()
    async with store(Identity(before=gate), decoder) as (jobs, _, _):
        job = await accept(jobs)
        await until(lambda: job.status == "running")
        following = job.follow(2, ping_s=0.01)
        assert [await anext(following), await anext(following)] == [None, None]
        gate.opened.set()
        assert [event.status async for event in following if event is not None] == ["done"]


async def test_a_cancelled_job_never_reaches_the_model_and_frees_its_place(decoder):
    gate = Gate()
    model = Identity(before=gate)
    async with store(model, decoder, max_batch=1, max_wait_ms=0) as (jobs, engine, ends):
        running = await accept(jobs)
        await until(lambda: running.status == "running")
        waiting = await accept(jobs)
        await jobs.cancel(waiting)
        assert (waiting.status, engine.health().waiting) == ("cancelled", 0)
        await jobs.cancel(running)
        assert running.status == "cancelled" and running.translated is None
        assert engine.idle and jobs.settled
        gate.opened.set()
        await until(lambda: engine.health().running == 0)
        assert await statuses(running) == ["queued", "running", "cancelled"]
    assert model.batches == [1] and ends == ["cancelled", "cancelled"]


async def test_a_job_that_is_cancelled_before_its_first_step_leaves_nothing_behind(decoder):
    gate = Gate()
    async with store(Identity(before=gate), decoder, max_batch=1, max_wait_ms=0) as (jobs, engine, _):
        await accept(jobs)
        await until(gate.reached.is_set)
        # accept() ends without a pause between the job's making and this
        job = await accept(jobs)
        await jobs.cancel(job)
        assert engine.health().waiting == 0
        assert engine.health().details["admitted"] == 1
        gate.opened.set()


async def test_twins_with_one_key_that_come_at_the_same_time_are_one_job(decoder):
    model = Identity()
    async with store(model, decoder) as (jobs, engine, _):
        twins = await asyncio.gather(*(accept(jobs, 5, key="k") for _ in range(4)))
        assert len({twin.id for twin in twins}) == len(jobs) == 1
        await statuses(twins[0])
        await until(lambda: engine.idle)
        with pytest.raises(ApiError) as raised:
            await accept(jobs, 6, key="k")
        assert raised.value.code == "idempotency_key_reused"
        assert (await accept(jobs, 5, key="another")).id != twins[0].id
    assert sum(model.batches) <= 2


async def test_a_finished_job_and_its_key_are_forgotten_after_their_time(decoder):
    async with store(Identity(), decoder, job_keep_s=0.1) as (jobs, _, _):
        job = await accept(jobs, key="k")
        await statuses(job)
        assert jobs.get(job.id) is job and jobs.knows("k")
        await until(lambda: len(jobs) == 0)
        assert not jobs.knows("k")
        with pytest.raises(ApiError, match="there is no job") as raised:
            jobs.get(job.id)
        assert raised.value.code == "job_not_found"


async def test_results_that_were_fetched_make_room_and_those_that_were_not_are_kept(decoder):
    async with store(Identity(), decoder, max_jobs=2, job_keep_s=50) as (jobs, engine, _):
        first, second = await accept(jobs), await accept(jobs)
        for job in (first, second):
            await statuses(job)
        with pytest.raises(ApiError, match="2 jobs wait for their results") as raised:
            await accept(jobs)
        assert raised.value.code == "too_many_jobs"
        assert raised.value.retry_after_s is not None and 40 < raised.value.retry_after_s <= 50
        assert engine.idle
        second.collected = True
        third = await accept(jobs)
        assert jobs.get(first.id) is first and jobs.get(third.id) is third
        with pytest.raises(ApiError, match="there is no job"):
            jobs.get(second.id)


async def test_the_pixels_of_all_jobs_together_are_bounded(decoder):
    image_bytes = 3 * 64 * 64
    async with store(Identity(), decoder, max_jobs_bytes=2 * image_bytes) as (jobs, _, _):
        for _ in range(2):
            await accept(jobs)
        with pytest.raises(ApiError) as raised:
            await accept(jobs)
        assert raised.value.code == "too_many_jobs"


async def test_a_finished_job_holds_the_pixels_it_is_counted_with_and_no_others(decoder):
    async with store(Identity(), decoder, max_wait_ms=200) as (jobs, _, _):
        several = await asyncio.gather(*(accept(jobs, number) for number in range(8)))  # one batch, one tensor
        uploads = [weakref.ref(job._ticket) for job in several if job._ticket is not None]
        for job in several:
            await statuses(job)
            assert job.translated is not None
            assert job.translated.answer.image.untyped_storage().nbytes() == job.size_bytes == 3 * 64 * 64
            assert job.place is None
        gc.collect()
        assert [upload() for upload in uploads] == [None] * 8


async def test_a_job_takes_a_place_of_the_bounded_queue(decoder):
    gate = Gate()
    async with store(Identity(before=gate), decoder, max_batch=1, queue=1) as (jobs, engine, _):
        await accept(jobs)
        await accept(jobs)
        with pytest.raises(ApiError) as raised:
            await accept(jobs)
        assert (raised.value.code, len(jobs), engine.idle) == ("queue_full", 2, False)
        gate.opened.set()
        await until(lambda: engine.idle)


async def test_a_failed_job_says_why_and_keeps_no_pixels(decoder, caplog: pytest.LogCaptureFixture):
    def fail(images) -> None:
        raise ValueError("of the model")

    async with store(Identity(before=fail), decoder) as (jobs, engine, ends):
        job = await accept(jobs)
        assert await statuses(job) == ["queued", "running", "failed"]
        assert job.error is not None and job.error.code == "model_error"
        assert (job.translated, job.size_bytes, engine.idle, jobs.settled) == (None, 0, True, False)
    assert ends == ["failed"]
    assert "jobs that are lost, since nobody fetched their results in time: 1" in caplog.text


async def test_a_job_without_an_answer_in_time_fails_and_frees_its_place(decoder):
    gate = Gate()
    async with store(Identity(before=gate), decoder, timeout_s=0.3) as (jobs, engine, _):
        job = await accept(jobs)
        assert (await statuses(job))[-1] == "failed"
        assert job.error is not None and job.error.code == "deadline_exceeded"
        assert engine.idle
        gate.opened.set()


async def test_an_unforeseen_failure_is_a_mistake_of_ours_in_the_log(
    decoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    class Broken:
        place = None

        async def answer(self):
            raise LookupError("ours")

        def leave(self) -> None: ...

    async with store(Identity(), decoder) as (jobs, engine, _):
        monkeypatch.setattr(engine, "submit", lambda task, on_start: Broken())
        job = await accept(jobs)
        assert await statuses(job) == ["queued", "failed"]
        assert job.error is not None and job.error.code == "internal_error" and job.id in job.error.message
        assert "LookupError: ours" in caplog.text and engine.idle


async def test_while_the_engine_drains_accepted_jobs_are_finished_and_new_ones_refused(decoder):
    gate = Gate()
    async with store(Identity(before=gate), decoder, max_batch=1, max_wait_ms=0) as (jobs, engine, _):
        accepted = [await accept(jobs, number) for number in range(5)]
        engine.drain()
        with pytest.raises(ApiError) as raised:
            await accept(jobs)
        assert raised.value.code == "draining"
        assert not engine.idle and not jobs.settled
        gate.opened.set()
        for number, job in enumerate(accepted):
            assert (await statuses(job))[-1] == "done"
            assert job.translated is not None and number_of(job.translated.answer.image) == number
        assert engine.idle
        assert not jobs.settled
        for job in accepted:
            job.collected = True
        assert jobs.settled
