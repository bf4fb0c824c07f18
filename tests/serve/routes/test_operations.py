import asyncio

import pytest
import torch
from serving import PNG, Gate, Identity, numbered, png, served, until

from clipdit_serve.settings import ServeSettings

pytestmark = pytest.mark.anyio

READY = ("/readyz", "/health", "/healthz")


def figures(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")}


async def test_ready_only_when_the_model_is_warm_and_alive_all_along(decoder):
    gate = Gate()

    def open_model():
        gate(torch.ones(1))
        return Identity()

    async with served(open_model, ServeSettings(), decoder, wait=False) as (client, engine):
        for path in READY:
            answer = await client.get(path)
            assert (answer.status_code, answer.json()) == (503, {"status": "loading"})
            assert "retry-after" in answer.headers
        assert (await client.get("/livez")).status_code == 200
        gate.opened.set()
        await until(lambda: engine.health().state == "ready")
        for path in READY:
            answer = await client.get(path)
            assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
        verbose = (await client.get("/readyz?verbose")).json()
        assert verbose["backend"] == "fake" and verbose["waiting"] == 0 and verbose["model"].startswith("clipdit@")
        engine.drain()
        assert (await client.get("/readyz")).json() == {"status": "draining"}


async def test_not_ready_while_the_decoding_processes_start():
    class Starting:
        ready = False

        async def start(self) -> None: ...
        def close(self) -> None: ...
        async def decode(self, data, limits, size, fit): ...

    async with served(Identity(), ServeSettings(), Starting()) as (client, _):
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "loading")


async def test_a_dead_model_is_neither_ready_nor_alive(decoder):
    def die(images: torch.Tensor) -> None:
        raise SystemExit

    async with served(Identity(before=die), ServeSettings(), decoder) as (client, engine):
        answer = await client.post("/v1/translate", content=png(numbered(1)), headers=PNG)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")
        await until(lambda: engine.health().state == "dead", within_s=5)
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/livez")).status_code == 503


async def test_a_hanging_model_is_alive_and_not_ready(decoder):
    gate = Gate()
    async with served(Identity(before=gate), ServeSettings(hang_s=0.3), decoder) as (client, _):
        asking = asyncio.create_task(client.post("/v1/translate", content=png(numbered(1)), headers=PNG))
        await until(gate.reached.is_set)
        async with asyncio.timeout(5):
            while (await client.get("/readyz")).status_code == 200:
                await asyncio.sleep(0.02)
        assert (await client.get("/readyz")).json() == {"status": "hung"}
        assert (await client.get("/livez")).status_code == 200
        gate.opened.set()
        assert (await asking).status_code == 200
        assert (await client.get("/readyz")).status_code == 200


async def test_a_full_queue_is_not_ready(decoder):
    gate = Gate()
    async with served(Identity(before=gate), ServeSettings(queue=2, max_batch=1), decoder) as (client, engine):
        asking = [asyncio.create_task(client.post("/v1/translate", content=png(numbered(1)), headers=PNG)) for _ in range(3)]
        await until(gate.reached.is_set)
        await until(lambda: engine.health().waiting == 2)
        assert (await client.get("/readyz")).json() == {"status": "full"}
        gate.opened.set()
        assert [(await task).status_code for task in asking] == [200] * 3


async def test_metrics_count_what_happened(decoder):
    gate = Gate()
    async with served(Identity(before=gate), ServeSettings(queue=1, max_batch=1), decoder) as (client, engine):
        image = png(numbered(1))
        asking = [asyncio.create_task(client.post("/v1/translate", content=image, headers=PNG)) for _ in range(2)]
        await until(lambda: engine.health().waiting == 1)
        assert (await client.post("/v1/translate", content=image, headers=PNG)).status_code == 429
        assert figures((await client.get("/metrics")).text)["clipdit_queue_depth"] == 1
        gate.opened.set()
        await asyncio.gather(*asking)
        await client.post("/v1/translate", content=image[:50], headers=PNG)
        await client.get("/a-path-of-a-caller")
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        found = figures(answer.text)
    assert found['clipdit_requests_total{code="200",route="/v1/translate"}'] == 2
    assert found['clipdit_requests_total{code="429",route="/v1/translate"}'] == 1
    assert found['clipdit_requests_total{code="404",route="other"}'] == 1
    assert found['clipdit_rejected_total{reason="queue_full"}'] == 1
    assert found['clipdit_bad_input_total{reason="image_damaged"}'] == 1
    assert found["clipdit_cancelled_total"] == 0
    assert (
        found["clipdit_queue_wait_seconds_count"] == found["clipdit_batch_size_sum"] == found["clipdit_model_seconds_count"] == 2
    )
    assert found['clipdit_request_seconds_count{route="/v1/translate"}'] == 4
    assert found["clipdit_queue_depth"] == 0
    (info,) = [name for name in found if name.startswith("clipdit_model_info")]
    assert 'backend="fake"' in info and 'precision="float32"' in info and "revision=" in info
    assert "a-path-of-a-caller" not in answer.text
