"""Hours of traffic leave nothing behind: memory, open files and temporary files are what they were."""

import asyncio
import collections
import os
import random
import time
from pathlib import Path

import aiohttp
import numpy as np
import psutil
import pytest
import torch
from bad_images import bad_images
from serving import PNG, Running, png

MINUTES = float(os.environ.get("CLIPDIT_SOAK_MINUTES", "20"))
WARM_UP_MINUTES = MINUTES / 4
"""In which caches fill and the heap finds its size."""

BAD = sorted(bad_images().items())

CALLERS, PAUSE_S = 4, 0.1
"""Each waits so long between two requests: a service at its limit would measure the limit."""


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 300)
def test_twenty_minutes_of_all_kinds_of_requests_leave_memory_and_files_as_they_were(tmp_path):
    """SERVE: at most 0.5 MB a minute after the warm-up, of the service and its decoding processes together; no request without
    the answer it should get. CLIPDIT_SOAK_MINUTES says how long."""
    service = Running("--size", "256x256", "--job-keep-s", "5", environment={"TMPDIR": str(tmp_path)})
    try:
        process = psutil.Process(service.process.pid)
        seen, answers = asyncio.run(_soak(service.url, process, tmp_path))
    except BaseException:  # an interrupt, too: the service must not stay
        service.process.kill()
        raise
    minutes, megabytes, files, temporary = np.array([row for row in seen if row[0] >= WARM_UP_MINUTES]).T
    slope = np.polyfit(minutes, megabytes, 1)[0]
    print(f"\n{sum(answers.values())} requests in {MINUTES:g} minutes: {dict(answers)}")
    print(f"{slope:+.3f} MB a minute; {megabytes[0]:.0f} MB after the warm-up, {megabytes[-1]:.0f} MB at the end")
    by_minute = [round(float(megabytes[minutes >= minute][0])) for minute in np.arange(minutes[0], minutes[-1], 1)]
    print(f"MB, minute by minute: {by_minute}")  # a heap that finds its size, or one that grows
    print(f"{files.min():.0f} to {files.max():.0f} open files, {temporary.min():.0f} to {temporary.max():.0f} temporary files")
    log = service.stop()
    assert slope <= 0.5
    assert files[-1] <= files[0] + 2 * CALLERS
    assert temporary[-1] <= temporary[0]
    assert not [line for line in log if line["level"] in ("ERROR", "CRITICAL")]


async def _soak(url: str, process: psutil.Process, temporary: Path) -> tuple[list[tuple], collections.Counter]:
    """(minute, megabytes, open files, temporary files) every few seconds; and how many requests of each kind were answered."""
    answers: collections.Counter[str] = collections.Counter()
    seen: list[tuple] = []
    began = time.monotonic()

    def minute() -> float:
        return (time.monotonic() - began) / 60

    async def caller(number: int) -> None:
        chance = random.Random(number)
        async with aiohttp.ClientSession(url) as session:
            while minute() < MINUTES:
                kind = chance.choice(KINDS)
                await kind(session, chance)
                answers[kind.__name__] += 1
                await asyncio.sleep(PAUSE_S)

    async def watch() -> None:
        while minute() < MINUTES:
            family = [process, *process.children(recursive=True)]
            megabytes = sum(member.memory_full_info().uss for member in family) / 2**20
            seen.append((minute(), megabytes, process.num_fds(), sum(1 for _ in temporary.rglob("*"))))
            await asyncio.sleep(5)

    async with asyncio.TaskGroup() as group:
        group.create_task(watch())
        for number in range(CALLERS):
            group.create_task(caller(number))
    return seen, answers


async def translation(session: aiohttp.ClientSession, chance: random.Random) -> None:
    side, other = chance.randrange(16, 700), chance.randrange(16, 700)
    type = chance.choice(["image/png", "image/jpeg", "image/webp", "application/json"])
    async with session.post("/v1/translate", data=_image(side, other, chance), headers=PNG | {"accept": type}) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.content_type == type and await answer.read()


async def bad_image(session: aiohttp.ClientSession, chance: random.Random) -> None:
    name, (data, (status, _code)) = chance.choice(BAD)
    async with session.post("/v1/translate", data=data, headers=PNG) as answer:
        assert answer.status == status, (name, await answer.text())


async def caller_who_leaves(session: aiohttp.ClientSession, chance: random.Random) -> None:
    try:
        async with asyncio.timeout(chance.uniform(0, 0.02)):
            async with session.post("/v1/translate", data=_image(256, 256, chance), headers=PNG):
                pass
    except TimeoutError:
        pass


async def job(session: aiohttp.ClientSession, chance: random.Random) -> None:
    async with session.post("/v1/jobs", data=_image(64, 64, chance), headers=PNG) as answer:
        assert answer.status == 202, await answer.text()
        path = answer.headers["location"]
    async with session.get(f"{path}/events") as events:
        assert b"event: done" in await events.read()
    if chance.random() < 0.5:  # else its time runs out
        async with session.delete(path) as gone:
            assert gone.status == 200, await gone.text()


async def look(session: aiohttp.ClientSession, chance: random.Random) -> None:
    async with session.get(
        chance.choice(["/metrics", "/readyz?verbose", "/openapi.json", "/", "/v1/models", "/nothing"])
    ) as page:
        assert page.status in (200, 404) and await page.read()


KINDS = [translation, translation, bad_image, caller_who_leaves, job, look]


def _image(height: int, width: int, chance: random.Random) -> bytes:
    block = torch.randint(1, 256, (3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(chance.randrange(2**31)))
    return png(block.repeat(1, -(-height // 4), -(-width // 4))[:, :height, :width].contiguous())
