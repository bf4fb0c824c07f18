"""The load test itself: what it sends, when, and that every request is counted once."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from clipdit_serve.load.measuring import (
    SHARES,
    Ask,
    Outcome,
    Plan,
    capacity,
    check,
    level,
    measure,
    moments,
    open_session,
    summary,
)

pytestmark = pytest.mark.anyio

ASK = Ask(image=b"an image", steps=3)
KINDS = ("answered", "refused", "failed", "hung")
Translate = Callable[[web.Request], Awaitable[web.Response]]


def image() -> web.Response:
    return web.Response(body=b"translated", content_type="image/png", headers={"x-clipdit-model": "edges@1234"})


@contextlib.asynccontextmanager
async def asked(translate: Translate, ready: int = 200) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    """A session, and the address of a service that translates so."""

    async def readyz(request: web.Request) -> web.Response:
        return web.json_response({"status": "ready" if ready == 200 else "loading", "backend": "eager"}, status=ready)

    app = web.Application()
    app.router.add_post("/v1/translate", translate)
    app.router.add_get("/readyz", readyz)
    async with TestServer(app) as server, open_session("a-key") as session:
        yield session, str(server.make_url("")).rstrip("/")


def outcome(latency_s: float, kind="answered", due_s: float = 0.0) -> Outcome:
    return Outcome(kind=kind, said=kind, late_s=0.001, latency_s=latency_s, ended_s=due_s + latency_s)


async def test_a_request_carries_image_key_and_settings_and_no_two_are_the_same():
    seen = []

    async def translate(request: web.Request) -> web.Response:
        seen.append((await request.read(), request.headers["authorization"], request.content_type, request.query["steps"]))
        seeds.add(request.query["seed"])
        return image()

    seeds: set[str] = set()
    async with asked(translate) as (session, url):
        found = await level(session, url, ASK, Plan(seconds=0.1, at_least=20), 200)
    assert found["sent"] == found["answered"] == len(seeds) == 20
    assert set(seen) == {(b"an image", "Bearer a-key", "image/png", "3")}


async def test_requests_are_sent_when_they_are_due_however_slow_the_service_is():
    """One at a time, 50 ms each, 40 a second offered: a caller who waits for answers would see 50 ms and send 20 a second."""
    came_s: list[float] = []
    one_at_a_time = asyncio.Lock()

    async def translate(request: web.Request) -> web.Response:
        came_s.append(time.perf_counter())
        async with one_at_a_time:
            await asyncio.sleep(0.05)
        return image()

    async with asked(translate) as (session, url):
        found = await level(session, url, ASK, Plan(seconds=1, at_least=1, arrivals="even"), 40)
    assert found["sent"] == found["answered"] == 40
    assert came_s[-1] - came_s[0] < 1.5  # 2 s by callers who wait
    # the last one waits for 40 x 50 ms and came 975 ms after the first
    assert found["answered_ms"]["p99"] > 900
    assert found["answered_per_s"] < 21


async def test_latency_counts_from_the_moment_a_request_was_due_and_not_from_when_we_could_send_it():
    numbers = itertools.count()

    async def translate(request: web.Request) -> web.Response:
        if next(numbers) == 0:
            time.sleep(0.5)
        return image()

    async with asked(translate) as (session, url):
        found = await level(session, url, ASK, Plan(seconds=0.5, at_least=1, arrivals="even"), 100)
    assert found["answered"] == 50
    assert found["late_ms"]["p99"] > 350
    assert found["answered_ms"]["p99"] > 400
    assert found["answered_ms"]["p50"] > 150


async def test_answers_refusals_failures_and_hung_requests_add_up_to_what_was_sent():
    numbers = itertools.count()

    async def translate(request: web.Request) -> web.Response:
        match next(numbers) % 6:
            case 0:
                return web.json_response({}, status=429, headers={"x-clipdit-error": "queue_full"})
            case 1:
                return web.json_response({}, status=503, headers={"x-clipdit-error": "draining"})
            case 2:
                assert request.transport is not None
                request.transport.abort()
            case 3:
                await asyncio.sleep(30)
            case 4:
                return web.Response(text="<html>", content_type="text/html")
        return image()

    async with asked(translate) as (session, url):
        began = time.perf_counter()
        found = await level(session, url, ASK, Plan(seconds=0.3, at_least=1, timeout_s=2), 200)
        assert time.perf_counter() - began < 10
    assert {kind: found[kind] for kind in KINDS} == {"answered": 10, "refused": 10, "failed": 30, "hung": 10}
    assert found["sent"] == 60
    (lost,) = set(found["said"]) - {
        "200 image/png", "429 queue_full", "503 draining", "200 text/html", "no answer within 2 s"
    }  # fmt: skip
    assert lost.startswith(("Server", "Client")) and sum(found["said"].values()) == 60


async def test_a_service_that_is_gone_is_60_failures_and_no_exception():
    async with open_session(None) as session:
        found = await level(session, f"http://127.0.0.1:{unused_port()}", ASK, Plan(seconds=0.3, at_least=1), 200)
    assert (found["failed"], found["sent"], found["answered_ms"], found["answered_per_s"]) == (60, 60, None, 0.0)


async def test_capacity_is_what_callers_get_who_wait_for_their_answers():
    room = asyncio.Semaphore(2)

    async def translate(request: web.Request) -> web.Response:
        async with room:
            await asyncio.sleep(0.05)
        return image()

    async with asked(translate) as (session, url):
        found = await capacity(session, url, ASK, Plan(callers=4, capacity_s=1))
    assert 10 < found["per_s"] <= 40
    assert found["callers"] == 4


async def test_where_nobody_is_answered_there_is_no_capacity_but_a_reason():
    async def translate(request: web.Request) -> web.Response:
        return web.json_response({}, status=503, headers={"x-clipdit-error": "model_unavailable"})

    async with asked(translate) as (session, url):
        with pytest.raises(ValueError, match=r"2 callers got no answer within 0.2 s, but 503 model_unavailable"):
            await capacity(session, url, ASK, Plan(callers=2, capacity_s=0.2))


async def test_rates_come_from_the_capacity_and_each_is_told_when_it_is_done():
    async def translate(request: web.Request) -> web.Response:
        await asyncio.sleep(0.02)
        return image()

    told: list[int] = []
    async with asked(translate) as (session, url):
        plan = Plan(callers=2, capacity_s=0.3, seconds=0.1, at_least=1)
        record = await measure(session, url, ASK, plan, each=lambda record: told.append(len(record["levels"])))
    assert told == [*range(1, len(SHARES) + 1), len(SHARES)]
    assert record["capacity"]["again_per_s"] > 0
    offered = [found["offered_per_s"] for found in record["levels"]]
    assert offered == pytest.approx([share * record["capacity"]["per_s"] for share in SHARES], abs=1e-3)
    assert offered == record["protocol"]["rates"]


async def test_given_rates_are_tried_in_order_and_a_service_that_went_away_ends_it():
    async def translate(request: web.Request) -> web.Response:
        return web.json_response({}, status=500)

    async with asked(translate) as (session, url):
        record = await measure(session, url, ASK, Plan(rates=(200, 100), seconds=0.1, at_least=1))
    assert record["capacity"] is None
    assert [(found["offered_per_s"], found["failed"]) for found in record["levels"]] == [(100, 10)]


async def test_what_is_served_is_asked_before():
    async def translate(request: web.Request) -> web.Response:
        return image()

    async with asked(translate) as (session, url):
        assert await check(session, url, ASK, timeout_s=5) == {
            "url": url, "model": "edges@1234", "backend": "eager", "precision": None
        }  # fmt: skip
    async with asked(translate, ready=503) as (session, url):
        with pytest.raises(ValueError, match="is not ready: /readyz says 503 loading"):
            await check(session, url, ASK, timeout_s=5)


async def test_a_wrong_key_is_said_before_anything_is_measured():
    async def translate(request: web.Request) -> web.Response:
        return web.json_response({}, status=401, headers={"x-clipdit-error": "invalid_api_key"})

    async with asked(translate) as (session, url):
        with pytest.raises(ValueError, match=r"does not translate: 401 invalid_api_key; set CLIPDIT_API_KEY"):
            await check(session, url, ASK, timeout_s=5)


def test_arrivals_are_as_many_as_the_rate_says_and_the_same_in_every_run():
    even = moments(4, 2, "even", 0)
    assert even == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]
    poisson = moments(50, 20, "poisson", 0)
    assert len(poisson) == 1000 and poisson == sorted(poisson) and poisson[0] >= 0 and poisson[-1] <= 20
    assert poisson == moments(50, 20, "poisson", 0) != moments(50, 20, "poisson", 1)
    gaps = sorted(after - before for before, after in itertools.pairwise(poisson))
    assert gaps[len(gaps) // 2] == pytest.approx(0.6931 / 50, rel=0.15)  # the median of an exponential distribution
    assert len(moments(0.1, 1, "poisson", 0)) == 1


def test_percentiles_are_times_that_were_measured():
    found = summary(10, 10, [outcome(ms / 1000) for ms in range(1, 101)])
    assert found["answered_ms"] == pytest.approx({"p50": 50, "p95": 95, "p99": 99})
    assert found["late_ms"] == pytest.approx({"p50": 1, "p95": 1, "p99": 1})
    assert found["refused_ms"] is None
    assert found["answered_per_s"] == 10
    few = summary(1, 3, [outcome(0.1), outcome(0.2), outcome(0.3, "refused")])
    assert few["answered_ms"]["p99"] == pytest.approx(200)
    assert few["refused_ms"]["p50"] == pytest.approx(300)
    assert few["steady"] is None


def test_answers_that_come_after_the_last_request_do_not_count_as_speed():
    """10 a second for 10 s, answered at 5 a second: the last answer comes 20 s after the first."""
    found = summary(10, 10, [outcome(0.2 * (i + 1) - 0.1 * i, due_s=0.1 * i) for i in range(100)])
    assert found["answered_per_s"] == pytest.approx(5, rel=0.02)
    assert found["steady"] is False


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rates": (1.0, -2.0)}, "a rate is -2; wanted requests a second, more than 0"),
        ({"seconds": 0}, "seconds is 0; wanted more than 0"),
        ({"timeout_s": float("nan")}, "timeout_s is nan; wanted more than 0"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(wrong: dict, said: str):
    with pytest.raises(ValueError, match=said):
        Plan(**wrong)
