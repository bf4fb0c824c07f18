"""Parts of the service are killed, again and again, while it is asked; and there are more callers than one can count."""

import asyncio
import os
import random
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest
from ray_service import Outcomes, RayService, is_right, keep_asking, picture
from serving import Running

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayService]:
    """Two models, two ingresses."""
    folder = tmp_path_factory.mktemp("orders")
    # 5,000 callers wait for minutes on two cores
    words = ("--replicas", "2", "--ingress-replicas", "2", "--max-jobs", "0", "--queue", "6000", "--timeout-s", "600")
    running = RayService(folder, *words)
    yield running
    running.stop()


async def test_of_5000_concurrent_images_none_is_swapped_lost_or_doubled(service: RayService):
    """Who is refused for now, as every caller may be, comes again. Images are made before and looked at afterwards: this one
    process plays all callers, and would be late itself otherwise."""
    before, outcomes = sum(service.batches), Outcomes()
    numbers, answers = range(1, 5001), {}
    for number in numbers:
        picture(number)
    async with service.client() as client:

        async def until_answered(number: int) -> None:
            while await outcomes.ask(client, number, answers.__setitem__) in (429, 503):
                await asyncio.sleep(5)

        await asyncio.gather(*map(until_answered, numbers))
    print(f"\n{dict(outcomes.codes)}, {len(outcomes.broken)} broken connections")
    assert outcomes.codes[200, None] == 5000 and outcomes.statuses <= {200, 429, 503} and outcomes.broken == []
    assert sum(service.batches) - before == 5000
    for number in numbers:
        is_right(number, answers[number])


async def test_metrics_are_those_of_all_ingresses_whoever_answers(service: RayService):
    async with service.client() as client:
        await asyncio.gather(*(Outcomes().ask(client, number) for number in range(1, 101)))
        await asyncio.sleep(1)  # batches are told of when somebody looks
        pages = [(await client.get("/metrics")).text for _ in range(6)]
    for page in pages:
        assert len(set(re.findall(r'^clipdit_requests_total\{.*ingress="(\w+)"', page, re.MULTILINE))) == 2
        images = re.findall(r"^clipdit_batch_size_sum\{.*\} ([\d.e+]+)$", page, re.MULTILINE)
        assert sum(map(float, images)) == sum(service.batches)


async def test_overhead_is_that_of_a_few_messages_more_than_the_local_engines(service: RayService):
    """Side by side, in turns, one caller: what is measured is the way around the model, which takes next to nothing here."""
    local, took_s = Running(), {"local": [], "ray": []}
    async with service.client() as ray, httpx2.AsyncClient(base_url=local.url, timeout=60) as one:
        for _ in range(10):
            for name, client in (("local", one), ("ray", ray)):
                for _ in range(30):
                    outcomes = Outcomes()
                    assert await outcomes.ask(client, 7, is_right) == 200
                    took_s[name] += outcomes.took_s
    local.stop()
    p50_ms = {name: 1000 * statistics.median(times_s) for name, times_s in took_s.items()}
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    print(f"\np50 {p50_ms} ms, ratio {p50_ms['ray'] / p50_ms['local']:.2f}, {load:.1f} load a core")
    assert p50_ms["ray"] < 10 * p50_ms["local"]


async def test_20_kills_of_a_model_at_random_moments_cost_nobody_an_answer(service: RayService):
    outcomes, stop, chance, again_s = Outcomes(), asyncio.Event(), random.Random(1), []
    load = asyncio.create_task(keep_asking(service, outcomes, stop, 16, is_right))
    with service.order("delay", "0.05"):
        for _ in range(20):
            await asyncio.sleep(chance.uniform(0, 2))
            chance.choice(service.models).kill()
            killed = time.monotonic()
            await asyncio.sleep(0.6)  # until the ingresses have looked
            await service.wait(2, within_s=120)
            again_s.append(time.monotonic() - killed)
    stop.set()
    await load
    print(f"\n{sum(outcomes.codes.values())} answers; replaced after {min(again_s):.1f} to {max(again_s):.1f} s")
    assert set(outcomes.codes) == {(200, None)} and outcomes.broken == []


async def test_kill_9_of_an_ingress_is_told_in_our_words_and_it_is_replaced(service: RayService):
    outcomes, stop = Outcomes(), asyncio.Event()
    load = asyncio.create_task(keep_asking(service, outcomes, stop, 16, is_right))
    with service.order("delay", "0.05"):
        while sum(outcomes.codes.values()) < 50:
            await asyncio.sleep(0.01)
        victim = service.ingresses[0]
        decoders = victim.children(recursive=True)
        victim.kill()
        killed = time.monotonic()
        while len(service.ingresses) < 2 or time.monotonic() - killed < 2:
            await asyncio.sleep(0.1)
            assert time.monotonic() - killed < 120
        await service.wait(2, within_s=60)
        before = outcomes.codes.copy()
        await asyncio.sleep(2)
    stop.set()
    await load
    print(f"\n{dict(outcomes.codes)} {outcomes.broken}; two ingresses again {time.monotonic() - killed:.1f} s after the kill")
    # whoever was in it is told to come again, and knows that it is nobody's mistake
    assert set(outcomes.codes) <= {(200, None), (503, "model_unavailable")} and outcomes.broken == []
    assert 0 < outcomes.codes[503, "model_unavailable"] <= 16
    assert outcomes.codes[503, "model_unavailable"] == before[503, "model_unavailable"]
    assert not [process for process in decoders if process.is_running()]


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
async def test_kill_9_of_what_holds_ray_together_ends_the_service_within_5_seconds(name: str, tmp_path: Path):
    folders = set(Path("/tmp").glob("clipdit-ray-*"))
    service = RayService(tmp_path, "--replicas", "1")
    family = psutil.Process(service.process.pid).children(recursive=True)
    async with service.client() as client:
        assert (await client.get("/readyz")).status_code == 200
        (victim,) = [process for process in family if process.name() == name]
        victim.kill()
        killed = time.monotonic()
        assert await asyncio.to_thread(service.process.wait, 5) == 1
        for_s = time.monotonic() - killed
        with pytest.raises(httpx2.TransportError):
            await client.get("/readyz")
    print(f"\nended after {for_s:.1f} s")
    _, left = psutil.wait_procs(family, timeout=5)
    assert left == []
    (said,) = [line for line in service.log().splitlines() if f"Ray's {name}" in line]
    assert "start it again" in said
    assert set(Path("/tmp").glob("clipdit-ray-*")) == folders
    service.stop()
