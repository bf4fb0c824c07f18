import asyncio
import json
import re

import httpx2
import pytest
import torch
from serving import PNG, Gate, Identity, number_of, numbered, png, served, until

from clipdit.fake_backend import FakeBackend
from clipdit.images import encode_image, image_size, read_image
from clipdit.translator import Translator
from clipdit_serve.routes import jobs
from clipdit_serve.settings import ServeSettings

pytestmark = pytest.mark.anyio

IMAGE = png(numbered(77))


def code(answer: httpx2.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


def key(value: str) -> dict[str, str]:
    return PNG | {"idempotency-key": value}


async def post(client: httpx2.AsyncClient, query: str = "", headers: dict[str, str] = PNG, image: bytes = IMAGE) -> str:
    """The path of a new job."""
    answer = await client.post(f"/v1/jobs{query}", content=image, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.headers["location"]


async def events(client: httpx2.AsyncClient, path: str, last: str | None = None) -> list[tuple[int, str, dict]]:
    """(id, name, data) of each, up to the last one."""
    answer = await client.get(f"{path}/events", headers={} if last is None else {"last-event-id": last})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
    found = re.findall(r"^event: (\w+)\ndata: (.*)\nid: (\d+)\n\n", answer.text, re.MULTILINE)
    return [(int(id), name, json.loads(data)) for name, data, id in found]


async def test_a_job_is_accepted_followed_and_fetched(decoder):
    wanted = Translator(FakeBackend()).translate_image(numbered(77), seed=5, steps=3, guidance=1.5)
    async with served(Translator(FakeBackend()), ServeSettings(), decoder) as (client, _):
        answer = await client.post("/v1/jobs?seed=5&steps=3&guidance=1.5", content=IMAGE, headers=PNG)
        assert answer.status_code == 202
        job = answer.json()
        path = answer.headers["location"]
        assert path == f"/v1/jobs/{job['id']}" and re.fullmatch("[0-9a-f]{32}", job["id"])
        assert job["status"] in ("queued", "running") and job["seed"] == 5
        assert (job["result"], job["error"], job["expires"]) == (None, None, None)
        followed = await events(client, path)
        done = (await client.get(path)).json()
        result = await client.get(done["result"])
    assert [(id, name, data["status"]) for id, name, data in followed] == [
        (1, "queued", "queued"),
        (2, "running", "running"),
        (3, "done", "done"),
    ]
    assert followed[-1][2] == done
    assert (done["status"], done["place"], done["result"]) == ("done", None, f"{path}/result")
    assert done["expires"] - done["created"] in (600, 601)
    assert torch.equal(read_image(result.content), wanted)


async def test_raw_and_form_make_the_same_job(decoder):
    wanted = Translator(FakeBackend()).translate_image(numbered(77), seed=5, steps=3)
    async with served(Translator(FakeBackend()), ServeSettings(), decoder) as (client, _):
        raw = await post(client, "?seed=5&steps=3")
        form = await client.post("/v1/jobs", files={"image": ("a.png", IMAGE)}, data={"seed": "5", "steps": "3"})
        for path in (raw, form.headers["location"]):
            await events(client, path)
            assert torch.equal(read_image((await client.get(f"{path}/result")).content), wanted)


@pytest.mark.parametrize("accept", ["*/*", "image/webp", "image/jpeg", "application/json"])
async def test_a_result_is_what_translate_answers(accept: str, decoder):
    image = encode_image(torch.randint(256, (3, 50, 120), dtype=torch.uint8))
    async with served(Translator(FakeBackend()), ServeSettings(), decoder) as (client, _):
        at_once = await client.post("/v1/translate?seed=5&quality=60", content=image, headers=PNG | {"accept": accept})
        path = await post(client, "?seed=5&quality=60", image=image)
        await events(client, path)
        later = await client.get(f"{path}/result", headers={"accept": accept})
        again = await client.get(f"{path}/result", headers={"accept": accept})
        assert code(await client.get(f"{path}/result", headers={"accept": "text/html"})) == (406, "not_acceptable", None)
    assert later.status_code == 200
    assert later.content == again.content == at_once.content
    for name in ("content-type", "x-clipdit-model", "x-clipdit-seed", "vary"):
        assert later.headers[name] == at_once.headers[name]
    assert later.headers["server-timing"].startswith("decode;dur=")
    if accept != "application/json":
        assert image_size(later.content) == (50, 120)


async def test_a_job_says_its_place_in_the_queue_and_has_no_result_before_it_is_done(decoder):
    gate = Gate()
    async with served(Identity(before=gate), ServeSettings(max_batch=1, max_wait_ms=0), decoder) as (client, _):
        sync = asyncio.create_task(client.post("/v1/translate", content=IMAGE, headers=PNG))
        await until(gate.reached.is_set)
        paths = [await post(client, image=png(numbered(number))) for number in range(3)]
        told = [(await client.get(path)).json() for path in paths]
        assert [(job["status"], job["place"]) for job in told] == [("queued", 1), ("queued", 2), ("queued", 3)]
        assert (await client.get(paths[0])).headers["cache-control"] == "no-store"
        answer = await client.get(f"{paths[0]}/result")
        assert code(answer) == (409, "job_not_done", None)
        following = asyncio.create_task(events(client, paths[2]))
        gate.opened.set()
        assert (await sync).status_code == 200
        assert [(name, data["place"]) for _, name, data in await following] == [("queued", 3), ("running", None), ("done", None)]
        for number, path in enumerate(paths):
            await events(client, path)
            assert number_of(read_image((await client.get(f"{path}/result")).content)) == number


async def test_events_go_on_after_the_last_one_that_arrived(decoder):
    async with served(Identity(), ServeSettings(), decoder) as (client, _):
        path = await post(client)
        assert [id for id, _, _ in await events(client, path)] == [1, 2, 3]
        assert [id for id, _, _ in await events(client, path, "1")] == [2, 3]
        assert [id for id, _, _ in await events(client, path, "0")] == [1, 2, 3]
        for last in ("3", "4", "999"):
            answer = await client.get(f"{path}/events", headers={"last-event-id": last})
            assert (answer.status_code, answer.content) == (204, b"")
        for last in ("x", "-1", "1.5"):
            answer = await client.get(f"{path}/events", headers={"last-event-id": last})
            assert code(answer) == (400, "invalid_value", "Last-Event-ID")


async def test_a_stream_without_news_is_kept_alive_by_comments(decoder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "PING_S", 0.05)
    gate = Gate()
    async with served(Identity(before=gate), ServeSettings(), decoder) as (client, _):
        path = await post(client)
        following = asyncio.create_task(client.get(f"{path}/events"))
        await asyncio.sleep(0.3)
        gate.opened.set()
        text = (await following).text
    parts = text.removesuffix("\n\n").split("\n\n")
    assert parts.count(": ping") >= 2
    assert [part.splitlines()[0] for part in parts if part != ": ping"] == ["event: queued", "event: running", "event: done"]


async def test_a_job_is_cancelled_and_then_forgotten(decoder):
    gate = Gate()
    model = Identity(before=gate)
    async with served(model, ServeSettings(max_batch=1, max_wait_ms=0), decoder) as (client, engine):
        running, waiting = await post(client), await post(client)
        await until(gate.reached.is_set)
        following = asyncio.create_task(events(client, waiting))
        for path in (waiting, running):
            answer = await client.delete(path)
            assert (answer.status_code, answer.json()["status"], answer.json()["result"]) == (200, "cancelled", None)
            assert (await client.get(path)).json()["status"] == "cancelled"
            assert code(await client.get(f"{path}/result")) == (409, "job_not_done", None)
        assert [name for _, name, _ in await following] == ["queued", "cancelled"]
        assert engine.idle
        gate.opened.set()
        assert (await client.delete(waiting)).json()["status"] == "cancelled"
        for method, path in (("GET", waiting), ("GET", f"{waiting}/result"), ("GET", f"{waiting}/events"), ("DELETE", waiting)):
            assert code(await client.request(method, path)) == (404, "job_not_found", "id")
        await until(lambda: engine.health().running == 0)
        metrics = (await client.get("/metrics")).text
    assert model.batches == [1]
    assert 'clipdit_jobs_total{status="cancelled"} 2.0' in metrics
    assert 'route="/v1/jobs/{id}"' in metrics and waiting not in metrics


async def test_the_same_key_and_content_are_one_job_and_other_content_is_refused(decoder):
    model = Identity()
    async with served(model, ServeSettings(), decoder) as (client, engine):
        first = await post(client, "?seed=1", key("k"))
        assert await post(client, "?seed=1", key("k")) == first
        form = await client.post(
            "/v1/jobs", files={"image": ("a.png", IMAGE)}, data={"seed": "1"}, headers={"idempotency-key": "k"}
        )
        assert form.headers["location"] == first
        for query, image in (("?seed=2", IMAGE), ("?seed=1", png(numbered(78)))):
            answer = await client.post(f"/v1/jobs{query}", content=image, headers=key("k"))
            assert code(answer) == (422, "idempotency_key_reused", "Idempotency-Key")
        jobs = {first, await post(client, "?seed=1", key("another")), await post(client, "?seed=1")}
        assert len(jobs) == 3
        for job in jobs:  # each to its end: closing would stop those that wait
            await events(client, job)
        assert await post(client, "?seed=1", key("k")) == first  # done, and still the same
        engine.drain()
        assert await post(client, "?seed=1", key("k")) == first  # accepted is accepted
        assert code(await client.post("/v1/jobs", content=IMAGE, headers=key("new"))) == (503, "draining", None)
        await client.delete(first)
        assert code(await client.post("/v1/jobs?seed=1", content=IMAGE, headers=key("k"))) == (503, "draining", None)
    assert sum(model.batches) == 3


@pytest.mark.parametrize("value", ["", "a b", "x" * 256, "schl\u00fcssel"])
async def test_a_key_that_is_none_is_refused(value: str, decoder):
    async with served(Identity(), ServeSettings(), decoder) as (client, _):
        answer = await client.post("/v1/jobs", content=IMAGE, headers=[*PNG.items(), ("idempotency-key", value.encode())])
        assert code(answer) == (400, "invalid_value", "Idempotency-Key")


@pytest.mark.parametrize(
    ("query", "headers", "image", "wanted"),
    [
        ("?colour=red", PNG, IMAGE, (400, "unknown_field", "colour")),
        ("?seed=1&seed=2", PNG, IMAGE, (400, "invalid_value", "seed")),
        ("?steps=201", PNG, IMAGE, (400, "invalid_value", "steps")),
        ("?model=another", PNG, IMAGE, (404, "model_not_found", "model")),
        ("", {"content-type": "text/plain"}, IMAGE, (415, "unsupported_media_type", None)),
        ("", PNG, b"GIF89a", (415, "unsupported_image_format", "image")),
        ("", PNG, IMAGE[:50], (422, "image_damaged", "image")),
        ("", PNG, b"", (422, "image_empty", "image")),
        ("", PNG, bytes(40_001), (413, "body_too_large", None)),
        ("", PNG, png(torch.zeros(3, 8, 17_000, dtype=torch.uint8)), (422, "image_too_large", "image")),
    ],
)
async def test_what_translate_refuses_is_no_job(query: str, headers: dict, image: bytes, wanted: tuple, decoder):
    async with served(Identity(), ServeSettings(max_body_bytes=40_000), decoder) as (client, engine):
        answer = await client.post(f"/v1/jobs{query}", content=image, headers=headers | {"idempotency-key": "k"})
        assert code(answer) == wanted
        assert engine.idle
        assert (await post(client, headers=key("k"))).startswith("/v1/jobs/")  # the key is free


async def test_a_full_queue_refuses_jobs_and_jobs_fill_the_queue(decoder):
    gate = Gate()
    async with served(Identity(before=gate), ServeSettings(max_batch=1, queue=1), decoder) as (client, _):
        paths = [await post(client) for _ in range(2)]
        for route in ("/v1/jobs", "/v1/translate"):
            answer = await client.post(route, content=IMAGE, headers=PNG)
            assert code(answer) == (429, "queue_full", None)
            assert int(answer.headers["retry-after"]) >= 1
        gate.opened.set()
        for path in paths:
            assert (await events(client, path))[-1][1] == "done"


async def test_results_that_nobody_fetches_end_in_429_until_one_is_fetched(decoder):
    async with served(Identity(), ServeSettings(max_jobs=1, job_keep_s=20), decoder) as (client, _):
        path = await post(client)
        await events(client, path)
        answer = await client.post("/v1/jobs", content=IMAGE, headers=PNG)
        assert code(answer) == (429, "too_many_jobs", None)
        assert 15 < int(answer.headers["retry-after"]) <= 20
        assert (await client.get(f"{path}/result")).status_code == 200
        assert await post(client) != path
        assert code(await client.get(path)) == (404, "job_not_found", "id")
        metrics = (await client.get("/metrics")).text
    assert 'clipdit_rejected_total{reason="too_many_jobs"} 1.0' in metrics


async def test_a_failed_job_has_its_error_in_its_status_its_events_and_its_result(decoder):
    def fail(images: torch.Tensor) -> None:
        raise ValueError("of the model")

    async with served(Identity(before=fail), ServeSettings(), decoder) as (client, _):
        path = await post(client)
        told = (await events(client, path))[-1]
        status = (await client.get(path)).json()
        result = await client.get(f"{path}/result")
        metrics = (await client.get("/metrics")).text
    assert told == (3, "failed", status)
    assert (status["status"], status["result"], status["error"]["code"]) == ("failed", None, "model_error")
    assert result.json() == {"error": status["error"]}
    assert code(result) == (500, "model_error", None)
    assert 'clipdit_jobs_total{status="failed"} 1.0' in metrics


async def test_jobs_can_be_switched_off(decoder):
    async with served(Identity(), ServeSettings(max_jobs=0), decoder) as (client, _):
        assert code(await client.post("/v1/jobs", content=IMAGE, headers=PNG)) == (404, "not_found", None)
        assert not [path for path in (await client.get("/openapi.json")).json()["paths"] if path.startswith("/v1/jobs")]
        assert (await client.post("/v1/translate", content=IMAGE, headers=PNG)).status_code == 200


async def test_of_many_jobs_at_once_none_is_swapped_or_lost(decoder):
    count = 200
    model = Identity()
    async with served(model, ServeSettings(queue=count, max_jobs=count), decoder) as (client, engine):

        async def ask(number: int) -> int:
            path = await post(client, image=png(numbered(number)))
            assert (await events(client, path))[-1][1] == "done"
            return number_of(read_image((await client.get(f"{path}/result")).content))

        assert await asyncio.gather(*(ask(number) for number in range(count))) == list(range(count))
        assert engine.idle
    assert sum(model.batches) == count
