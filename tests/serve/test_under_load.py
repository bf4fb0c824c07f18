"""Many callers at the same time: everybody gets his own answer, or is told why not."""

import asyncio
import collections
import json
import os
import statistics
import subprocess
import sys
import time

import overhead
import pytest
from serving import PNG, Gate, Identity, number_of, numbered, png, served, until

from clipdit.images import read_image
from clipdit_serve.settings import ServeSettings

pytestmark = pytest.mark.anyio


async def test_of_5000_concurrent_images_none_is_swapped_lost_or_doubled(decoder):
    count = 5000
    model = Identity()
    async with served(model, ServeSettings(queue=count, timeout_s=240), decoder) as (client, _engine):

        async def ask(number: int) -> int:
            answer = await client.post("/v1/translate", content=png(numbered(number)), headers=PNG)
            assert answer.status_code == 200, answer.text
            return number_of(read_image(answer.content))

        answers = await asyncio.gather(*(ask(number) for number in range(count)))
    assert answers == list(range(count))
    assert sum(model.batches) == count
    assert max(model.batches) == 8


@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.slow)])
async def test_five_times_more_than_it_can_is_answered_or_refused_and_nobody_hangs(seconds: int, decoder):
    batch_s = 0.1  # 8 images each: 80 images a second
    settings = ServeSettings(queue=16, timeout_s=5)
    model = Identity(before=lambda images: time.sleep(batch_s))
    image = png(numbered(1))
    outcomes: collections.Counter[int] = collections.Counter()
    accepted_s: list[float] = []
    refused_s: list[float] = []
    async with served(model, settings, decoder) as (client, _engine):

        async def ask() -> None:
            began = time.perf_counter()
            answer = await client.post("/v1/translate", content=image, headers=PNG)
            outcomes[answer.status_code] += 1
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "queue_full"
            (accepted_s if answer.status_code == 200 else refused_s).append(time.perf_counter() - began)

        asking = []
        began = time.perf_counter()
        while (now := time.perf_counter() - began) < seconds:  # an open loop: callers do not wait for one another
            due = int(now * 5 * 8 / batch_s)
            asking += [asyncio.create_task(ask()) for _ in range(due - len(asking))]
            await asyncio.sleep(0.01)
        await asyncio.gather(*asking)
    assert outcomes[200] + outcomes[429] + outcomes[503] == len(asking), outcomes
    # a fifth of what the model can: this core also asks and decodes, and other tests and Ray's processes want their share
    assert outcomes[200] >= 0.2 * seconds * 8 / batch_s, outcomes
    assert outcomes[429] > 0
    # queue and one batch are (16 + 8 + 8) / 8 batches; the rest is this process, which plays both sides on one core
    longest_s = statistics.quantiles(accepted_s, n=100)[-1]
    print(f"\n{dict(outcomes)}; p99 of accepted {longest_s:.3f} s, of refused {statistics.quantiles(refused_s, n=100)[-1]:.3f} s")
    assert longest_s < 4 * batch_s + 3


async def test_when_100_queued_callers_leave_at_most_one_more_batch_runs(decoder):
    gate = Gate()
    model = Identity(before=gate)
    async with served(model, ServeSettings(queue=200), decoder) as (client, engine):
        first = asyncio.create_task(client.post("/v1/translate", content=png(numbered(0)), headers=PNG))
        await until(gate.reached.is_set)
        asking = [asyncio.create_task(client.post("/v1/translate", content=png(numbered(i)), headers=PNG)) for i in range(1, 101)]
        await until(lambda: engine.health().waiting == 100)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await until(lambda: engine.health().waiting == 0)
        gate.opened.set()
        assert number_of(read_image((await first).content)) == 0
        await asyncio.sleep(0.1)
        assert len(model.batches) <= 2
        assert engine.idle


def test_overhead_over_the_model_is_a_few_milliseconds():
    """SERVE: p50 <= 5 ms at 256 px on an idle machine; printed. The bound here is wide: a test machine is not idle."""
    words = [sys.executable, overhead.__file__]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    print(
        "\np50 {p50_ms:.2f} ms, p99 {p99_ms:.2f} ms around {model_ms:.2f} of model; the PNG alone {png_ms:.2f}; {timing}".format(
            **found
        )
    )
    print(f"{os.getloadavg()[0] / (os.cpu_count() or 1):.1f} load a core")
    assert found["right"] == overhead.REQUESTS
    assert found["p50_ms"] < 100
