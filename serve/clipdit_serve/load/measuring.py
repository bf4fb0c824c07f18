"""The load test: an open loop. Requests are sent when they are due, whatever became of those before them.

A closed loop, where each caller waits for his answer before he asks again, sends less as soon as the service slows down, so it
never sees the queue that real callers make. For the same reason a latency counts from the moment at which a request was due: were
we late to send it, that would be our fault, and the figures say how much it was (`late_ms`).
"""

import asyncio
import json
import logging
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import aiohttp
import numpy as np

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Arrivals = Literal["poisson", "even"]
Kind = Literal["answered", "refused", "failed", "hung"]

SHARES = (0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0)
"""Of the capacity: the rates, if none are given. Close together where latency begins to rise."""

GROWTH = 1.5
"""A rate is called unsteady when the median latency of its last third is so many times that of the third before it: a queue that
grows all the time makes it 5/3."""

FILES = 65_536
"""Open files this process may have, where the system lets it: a service that hangs keeps every connection open."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked, checked when made."""

    rates: tuple[float, ...] = ()
    """Requests a second; of the capacity `SHARES` if none are given."""
    seconds: float = 15.0
    """Each rate is kept so long."""
    at_least: int = 50
    """Or longer, until so many requests are sent. Of fewer than 100 answers p99 is the slowest."""
    arrivals: Arrivals = "poisson"
    """When requests are due: as those of callers who know nothing of one another, or evenly spaced."""
    callers: int = 16
    """Of the closed loop that finds the capacity; enough to fill the batches."""
    capacity_s: float = 8.0
    """How long it goes on, seconds."""
    timeout_s: float = 90.0
    """Without an answer for so long a request counts as hung, seconds; more than the service's own limit, which answers 504."""
    seed: int = 0
    """Of the moments of Poisson arrivals: the same ones in every run."""

    def __post_init__(self) -> None:
        for name in ("seconds", "at_least", "callers", "capacity_s", "timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name):g}; wanted more than 0")
        if wrong := [rate for rate in self.rates if not 0 < rate < float("inf")]:
            raise ValueError(f"a rate is {wrong[0]:g}; wanted requests a second, more than 0")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One translation, as all of them are."""

    image: bytes
    """An encoded image."""
    media_type: str = "image/png"
    """Of the image; the answer comes in the same."""
    steps: int | None = None
    """Of the solver; None is the model's own number."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a request. Times are seconds."""

    kind: Kind
    """answered: 200 with an image; refused: 429; hung: nothing within the time limit; failed: all else."""
    said: str
    """Status and code, such as "429 queue_full", or the kind of the error."""
    late_s: float
    """From the moment at which it was due to the one at which it was sent."""
    latency_s: float
    """From the moment at which it was due to the end of the answer."""
    ended_s: float
    """Likewise, on the clock of its rate."""


def open_session(key: str | None) -> aiohttp.ClientSession:
    """What all requests go through. No limits on time and connections: both are the plan's. key: the service's, if it has one.

    aiohttp and not httpx2: a request costs a third of the processor time, with hundreds in flight a tenth, and whoever asks often
    shares his cores with whoever answers."""
    return aiohttp.ClientSession(
        headers={} if key is None else {"authorization": f"Bearer {key}"},
        timeout=aiohttp.ClientTimeout(total=None),
        # shorter than uvicorn keeps idle connections: one that it is closing would look like a failure
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),
    )


async def check(session: aiohttp.ClientSession, url: str, ask: Ask, *, timeout_s: float) -> Record:
    """What is served, when it is ready and translates within so many seconds. ValueError when nothing answers there, or not as a
    service of ours."""
    try:
        async with asyncio.timeout(timeout_s):
            async with session.get(f"{url}/readyz?verbose") as health:
                said = _said(health, body := await health.read())
            if health.status != 200:
                raise ValueError(f"the service at {url} is not ready: /readyz says {said}")
            async with _request(session, url, ask, 0) as answer:
                said = _said(answer, await answer.read())
    except TimeoutError:
        raise ValueError(f"{url} takes longer than {timeout_s:g} s to answer") from None
    except aiohttp.ClientError as error:
        raise ValueError(
            f"nothing answers at {url}: {error or type(error).__name__}. Start it with `clipdit serve`, or leave out --url"
        ) from error
    if _kind(answer) != "answered":
        hint = "; set CLIPDIT_API_KEY to the key it was started with" if answer.status == 401 else ""
        raise ValueError(f"the service at {url} does not translate: {said}{hint}")
    details = {name: _json(body).get(name) for name in ("backend", "precision")}
    return {"url": url, "model": answer.headers.get("x-clipdit-model")} | details


async def measure(
    session: aiohttp.ClientSession, url: str, ask: Ask, plan: Plan, *, each: Callable[[Record], object] = lambda record: None
) -> Record:
    """Capacity, then every rate, from the lowest to the highest.

    Args:
        session: of `open_session`.
        url: of the service, without a path.
        each: called with the record so far after each rate.

    Returns the protocol, the capacity (before the rates and after them; None where rates were given) and the levels, as JSON can
    hold them. Stops early when a rate got neither answers nor refusals. ValueError when the closed loop gets no answers.
    """
    _allow_files()
    record: Record = {
        "protocol": asdict(plan) | {"steps": ask.steps, "upload_bytes": len(ask.image)},
        "capacity": None,
        "levels": [],
    }
    if not plan.rates:
        record["capacity"] = await capacity(session, url, ask, plan)
        logger.info("%d callers in a closed loop get %.3g answers a second", plan.callers, record["capacity"]["per_s"])
    rates = plan.rates or [round(share * record["capacity"]["per_s"], 3) for share in SHARES]
    record["protocol"]["rates"] = sorted(rates)
    for rate in sorted(rates):
        found = await level(session, url, ask, plan, rate)
        record["levels"].append(found)
        each(record)
        counts = ", ".join(f"{found[kind]} {kind}" for kind in ("answered", "refused", "failed", "hung"))
        logger.info("%.3g requests a second for %.3g s: %d sent, %s", rate, found["seconds"], found["sent"], counts)
        if not found["answered"] and not found["refused"]:
            logger.warning("the service answers no more; higher rates are left out")
            return record
    if not plan.rates:  # a machine that has become slower or faster meanwhile has measured that, too
        record["capacity"]["again_per_s"] = (await capacity(session, url, ask, plan))["per_s"]
        each(record)
    return record


async def capacity(session: aiohttp.ClientSession, url: str, ask: Ask, plan: Plan) -> Record:
    """per_s: answers a second that so many callers get who ask again as soon as they have one; answered; callers.

    ValueError when they get none."""
    began = time.perf_counter()
    outcomes: list[Outcome] = []

    async def ask_again_and_again() -> None:
        while (now := time.perf_counter()) - began < plan.capacity_s:
            outcome = await _ask(session, url, ask, len(outcomes), due=now, began=began, timeout_s=plan.timeout_s)
            outcomes.append(outcome)
            if outcome.kind != "answered":
                await asyncio.sleep(0.1)  # more callers than it has room for: ask again, but do not flood it

    await asyncio.gather(*(ask_again_and_again() for _ in range(plan.callers)))
    answered = [outcome for outcome in outcomes if outcome.kind == "answered"]
    if not answered:
        said = Counter(outcome.said for outcome in outcomes).most_common(1)[0][0]
        raise ValueError(f"{plan.callers} callers got no answer within {plan.capacity_s:g} s, but {said}")
    # to the last answer and not to the end of the time: what was asked before it counts on both sides
    return {"per_s": len(answered) / max(o.ended_s for o in answered), "answered": len(answered), "callers": plan.callers}


async def level(session: aiohttp.ClientSession, url: str, ask: Ask, plan: Plan, rate: float) -> Record:
    """One rate, requests a second, and what became of each request; returns when the last one has its answer or is hung."""
    due = moments(rate, max(plan.seconds, plan.at_least / rate), plan.arrivals, plan.seed)
    began = time.perf_counter()
    tasks = []
    for number, moment in enumerate(due):
        if (wait_s := began + moment - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        asking = _ask(session, url, ask, number, due=began + moment, began=began, timeout_s=plan.timeout_s)
        tasks.append(asyncio.create_task(asking))
    outcomes = await asyncio.gather(*tasks)
    return summary(rate, max(plan.seconds, plan.at_least / rate), outcomes)


def moments(rate: float, seconds: float, arrivals: Arrivals, seed: int) -> list[float]:
    """When requests are due, seconds from the beginning, in order. Their number is what the rate says, at least one.

    Poisson arrivals whose number is known are spread uniformly."""
    count = max(1, round(rate * seconds))
    if arrivals == "even":
        return [number / rate for number in range(count)]
    draw = random.Random(seed)
    return sorted(draw.uniform(0, seconds) for _ in range(count))


def summary(rate: float, seconds: float, outcomes: Sequence[Outcome]) -> Record:
    """The figures of a rate, from the outcomes of its requests in the order in which they were due.

    offered_per_s, seconds, sent; answered, refused, failed and hung, which add up to it; answered_per_s; answered_ms, refused_ms
    and late_ms: p50, p95 and p99, or None; said: how often the service, or the connection, said what; steady: whether latency had
    stopped growing, None where too few answers tell.
    """
    counts = Counter(outcome.kind for outcome in outcomes)
    ends = [outcome.ended_s for outcome in outcomes if outcome.kind == "answered"]
    return {
        "offered_per_s": rate,
        "seconds": seconds,
        "sent": len(outcomes),
        **{kind: counts[kind] for kind in ("answered", "refused", "failed", "hung")},
        # who waits when the last request is sent is answered later: his time counts as his answer does
        "answered_per_s": len(ends) / max(seconds, max(ends) - min(ends)) if ends else 0.0,
        "answered_ms": _percentiles([o.latency_s for o in outcomes if o.kind == "answered"]),
        "refused_ms": _percentiles([o.latency_s for o in outcomes if o.kind == "refused"]),
        "late_ms": _percentiles([o.late_s for o in outcomes]),
        "said": dict(Counter(o.said for o in outcomes).most_common()),
        "steady": _steady([o.latency_s for o in outcomes if o.kind == "answered"]),
    }


def _percentiles(seconds: Sequence[float]) -> Record | None:
    """Each is a time that was measured: of few, p99 is the slowest."""
    if not seconds:
        return None
    values = 1000 * np.percentile(seconds, (50, 95, 99), method="inverted_cdf")
    return dict(zip(("p50", "p95", "p99"), map(float, values), strict=True))


def _steady(latencies_s: Sequence[float]) -> bool | None:
    third = len(latencies_s) // 3
    if third < 10:
        return None
    before, last = np.median(latencies_s[third : 2 * third]), np.median(latencies_s[2 * third :])
    return bool(last <= GROWTH * before)


async def _ask(
    session: aiohttp.ClientSession, url: str, ask: Ask, number: int, *, due: float, began: float, timeout_s: float
) -> Outcome:
    sent = time.perf_counter()
    try:
        async with asyncio.timeout(max(0.0, due + timeout_s - sent)):
            async with _request(session, url, ask, number) as answer:
                kind, said = _kind(answer), _said(answer, await answer.read())
    except TimeoutError:
        kind, said = "hung", f"no answer within {timeout_s:g} s"
    except aiohttp.ClientError as error:
        kind, said = "failed", type(error).__name__
    now = time.perf_counter()
    return Outcome(kind=kind, said=said, late_s=sent - due, latency_s=now - due, ended_s=now - began)


def _request(session: aiohttp.ClientSession, url: str, ask: Ask, number: int):
    """The seed is the number: no two requests are the same, so that nobody between us and the model can answer from a store."""
    query = {"seed": number} | ({} if ask.steps is None else {"steps": ask.steps})
    headers = {"content-type": ask.media_type, "accept": ask.media_type}
    return session.post(f"{url}/v1/translate", params=query, data=ask.image, headers=headers, allow_redirects=False)


def _kind(answer: aiohttp.ClientResponse) -> Kind:
    if answer.status == 200 and answer.content_type.startswith("image/"):
        return "answered"
    return "refused" if answer.status == 429 else "failed"


def _said(answer: aiohttp.ClientResponse, body: bytes) -> str:
    """The status, and the code of our errors, or the status of /readyz."""
    if answer.status == 200:
        return f"200 {answer.content_type}"
    code = answer.headers.get("x-clipdit-error") or _json(body).get("status")
    return f"{answer.status} {code}" if code else str(answer.status)


def _json(body: bytes) -> Record:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _allow_files() -> None:
    """As many open files as the system lets us have, up to `FILES`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
