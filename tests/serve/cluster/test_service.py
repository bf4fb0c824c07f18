"""`clipdit serve --engine ray` as a user starts it: the real command, Ray, sockets and processes; only its model obeys us."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from ray_service import ALONE, KEY, Outcomes, RayService, is_right, keep_asking, sockets_of
from serving import PNG, numbered, png

from clipdit.images import read_image

# The order of the tests matters only for the last one.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(280)]


async def test_answers_are_bit_for_bit_those_of_the_local_engine(service: RayService):
    async with service.client() as client:
        for sampling in ({}, {"steps": 2}, {"steps": 3, "guidance": 2.5}):
            answer = await client.post("/v1/translate", params={"seed": 7, **sampling}, content=png(numbered(7)), headers=PNG)
            assert answer.status_code == 200, answer.text
            assert torch.equal(read_image(answer.content), ALONE.translate_image(numbered(7), seed=7, **sampling))
            assert answer.headers["x-clipdit-model"].endswith(ALONE.backend.fingerprint[:12])
            assert 'batch;desc="1"' in answer.headers["server-timing"]
        refused = await client.post("/v1/translate?steps=0", content=png(numbered(7)), headers=PNG)
        assert (refused.status_code, refused.headers["x-clipdit-error"]) == (400, "invalid_value")


@pytest.mark.slow
async def test_of_300_concurrent_images_none_is_swapped_lost_or_doubled(service: RayService):
    before, outcomes = sum(service.batches), Outcomes()
    async with service.client() as client:
        await asyncio.gather(*(outcomes.ask(client, number, is_right) for number in range(1, 301)))
    assert outcomes.codes == {(200, None): 300} and outcomes.broken == []
    assert sum(service.batches) - before == 300
    assert max(service.batches) <= 8
    # both replicas had work
    assert sum(bool(file.read_text()) for file in service.folder.glob("batches-*")) == 2


async def test_every_error_and_request_id_is_ours_whoever_answers(service: RayService):
    async with service.client() as client:
        for path, status, code in (
            ("/-/routes", 404, "not_found"),
            ("/nothing", 404, "not_found"),
            ("/v1/jobs/none", 404, "job_not_found"),
        ):
            answer = await client.get(path, headers={"x-request-id": "mine"})
            assert (answer.status_code, answer.headers["x-clipdit-error"]) == (status, code)
            assert answer.headers.get_list("x-request-id") == ["mine"]
        large = await client.post("/v1/translate", content=bytes(21 * 2**20), headers=PNG)
        assert (large.status_code, large.headers["x-clipdit-error"]) == (413, "body_too_large")

        async def without_a_length():
            for _ in range(40):
                yield bytes(2**20)

        large = await client.post("/v1/translate", content=without_a_length(), headers=PNG)
        assert (large.status_code, large.headers["x-clipdit-error"]) == (413, "body_too_large")
        assert (await client.get("/livez", headers={"x-long": "a" * 2_000_000})).status_code == 400
        refused = await client.get("/metrics", headers={"authorization": "Bearer another"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


async def test_jobs_are_followed_from_the_queue_to_their_result(service: RayService):
    async with service.client() as client:
        with service.order("delay", "0.3"):
            first = (await client.post("/v1/jobs?seed=1", content=png(numbered(1)), headers=PNG)).headers["location"]
            events = (await client.get(f"{first}/events")).text
        assert [line for line in events.splitlines() if line.startswith("event:")] == [
            "event: queued", "event: running", "event: done"
        ]  # fmt: skip
        is_right(1, (await client.get(f"{first}/result")).content)


@pytest.mark.slow
async def test_more_than_it_can_is_answered_or_refused_and_everybody_is_accounted_for(service: RayService):
    outcomes, before = Outcomes(), sum(service.batches)
    async with service.client() as client:
        with service.order("delay", "0.5"):
            await asyncio.gather(*(outcomes.ask(client, number, is_right) for number in range(1, 501)))
    # 503: a machine that is too busy for the replicas to say in time how they are
    assert set(outcomes.codes) - {(503, "model_unavailable")} == {(200, None), (429, "queue_full")} and outcomes.broken == []
    assert sum(outcomes.codes.values()) == 500
    assert sum(service.batches) - before == outcomes.codes[200, None] >= 100
    print(f"\n{dict(outcomes.codes)}; slowest {max(outcomes.took_s):.2f} s")


@pytest.mark.slow
async def test_when_callers_leave_the_queue_at_most_one_more_batch_runs(service: RayService):
    async def cancelled() -> float:
        text = (await client.get("/metrics")).text
        (line,) = [line for line in text.splitlines() if line.startswith("clipdit_cancelled_total")]
        return float(line.split()[1])

    async with service.client() as client:
        with service.order("delay", "0.6"):  # so that a batch which waits for seconds is not taken for one that hangs
            await asyncio.gather(*(Outcomes().ask(client, number) for number in range(1, 9)))
        was, ran = await cancelled(), len(service.batches)
        with service.order("hold"):
            asking = [asyncio.create_task(Outcomes().ask(client, number)) for number in range(1, 101)]
            for _ in range(80):
                health = (await client.get("/readyz?verbose")).json()
                if health["waiting"] + health["running"] == 100:
                    break
                await asyncio.sleep(0.05)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            running = health["running"]
            for _ in range(80):
                health = (await client.get("/readyz?verbose")).json()
                if health["waiting"] == 0:
                    break
                await asyncio.sleep(0.05)
            assert health["waiting"] == 0, health
        assert 1 <= running <= 16
        await asyncio.sleep(1)
        assert len(service.batches) - ran <= 2 + 1  # what ran already in both replicas, and one more
        assert await cancelled() - was == 100


@pytest.mark.slow
async def test_kill_9_of_a_model_under_load_costs_nobody_an_answer_and_it_is_replaced(service: RayService):
    outcomes, stop = Outcomes(), asyncio.Event()
    load = asyncio.create_task(keep_asking(service, outcomes, stop, 24, is_right))
    with service.order("delay", "0.05"):
        while sum(outcomes.codes.values()) < 50:
            await asyncio.sleep(0.01)
        victim = service.models[0]
        victim.kill()
        killed = time.monotonic()
        while time.monotonic() - killed < 2:
            await asyncio.sleep(0.05)
        assert (await _status(service, "/readyz")) == 200  # the other one answers
        again_s = await service.wait(2, within_s=60)
    stop.set()
    await load
    print(f"\n{sum(outcomes.codes.values())} answers; two replicas again {time.monotonic() - killed:.1f} s after the kill")
    assert set(outcomes.codes) == {(200, None)} and outcomes.broken == []
    assert again_s < 60 and victim.pid not in {model.pid for model in service.models}


@pytest.mark.slow
async def test_sighup_under_load_reloads_every_model_without_an_error_and_a_broken_one_is_refused(service: RayService):
    outcomes, stop = Outcomes(), asyncio.Event()
    load = asyncio.create_task(keep_asking(service, outcomes, stop, 8, is_right))
    async with service.client() as client:

        async def revisions() -> set[str]:
            asked = [client.post("/v1/translate?seed=1", content=png(numbered(1)), headers=PNG) for _ in range(20)]
            return {answer.headers["x-clipdit-model"].partition("@")[2] for answer in await asyncio.gather(*asked)}

        async def ended(result: str) -> int:
            line = f'clipdit_reloads_total{{result="{result}"}} '
            lines = (await client.get("/metrics")).text.splitlines()
            return next(int(float(text.removeprefix(line))) for text in lines if text.startswith(line))

        async def reload(result: str) -> None:
            before = await ended(result)
            service.process.send_signal(signal.SIGHUP)
            async with asyncio.timeout(60):
                while await ended(result) == before:
                    await asyncio.sleep(0.1)

        old = await revisions()
        assert len(old) == 1
        with service.order("revision", "abc"):
            await reload("done")
        assert await revisions() == {"abc000000000"}
        with service.order("broken"):
            await reload("refused")
        assert await revisions() == {"abc000000000"}
        await reload("done")
        assert await revisions() == old
    stop.set()
    await load
    assert set(outcomes.codes) == {(200, None)} and outcomes.broken == []


@pytest.mark.slow
async def test_readiness_ends_within_5_seconds_of_every_model_hanging_and_comes_back(service: RayService):
    async with service.client() as client:
        for _ in range(2):  # forget how long batches took in the tests before
            await asyncio.gather(*(Outcomes().ask(client, number) for number in range(1, 301)))
        hanging = service.models
        with service.order("hold"):
            began = time.monotonic()
            asking = [asyncio.create_task(Outcomes().ask(client, number)) for number in range(1, 17)]
            while await _status(service, "/readyz") == 200:
                assert time.monotonic() - began < 20
                await asyncio.sleep(0.05)
            unready_s = time.monotonic() - began
            assert await _status(service, "/livez") == 200  # Ray replaces them: nobody should restart all of it
            while any(model.is_running() for model in hanging):  # each ends itself some seconds later
                assert time.monotonic() - began < 40
                await asyncio.sleep(0.05)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
    again_s = await service.wait(2, within_s=90)
    print(f"\nunready after {unready_s:.1f} s, both replicas replaced {again_s:.1f} s later")
    assert unready_s < 5


async def _status(service: RayService, path: str) -> int:
    async with service.client() as client:
        return (await client.get(path)).status_code


async def test_nothing_listens_to_others_or_shows_the_key(service: RayService):
    processes = [psutil.Process(service.process.pid), *service.processes()]
    host, _, port = service.url.removeprefix("http://").rpartition(":")
    listening = sockets_of(processes)
    assert (host, int(port)) in [(address, port) for address, port, _ in listening]
    open_to_others = [entry for entry in listening if entry[0] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]
    # Serve opens one port a replica at every address, which asks for the cluster's token
    assert all(name.startswith(("ray::ServeReplica", "ray::SERVE_REPLICA")) for _, _, name in open_to_others), open_to_others
    for _, port, _ in open_to_others:
        await asyncio.to_thread(_is_refused, port)
    token = psutil.Process(service.models[0].pid).environ()["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    for process in processes:
        words = " ".join(process.cmdline())
        assert KEY not in words and token not in words
    for process in service.processes():
        assert "CLIPDIT_API_KEY" not in process.environ()
    assert KEY not in service.log() and token not in service.log()


def _is_refused(port: int) -> None:
    """A call without the token."""
    import grpc
    from ray.serve.generated.serve_pb2 import ASGIRequest
    from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
        ASGIServiceStub(channel).HandleRequest(ASGIRequest(), timeout=10)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.slow
async def test_sigterm_under_load_loses_no_admitted_request_and_leaves_nothing_behind(service: RayService):
    """The last test of this service."""
    outcomes, stop, mine = Outcomes(), asyncio.Event(), service.processes()
    (folder,) = {Path(word.partition("=")[2]) for p in mine for word in p.cmdline() if word.startswith("--temp_dir=")} or {None}
    load = asyncio.create_task(keep_asking(service, outcomes, stop, 8, is_right))
    while sum(outcomes.codes.values()) < 50:
        await asyncio.sleep(0.01)
    async with service.client() as client:
        service.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        while (answer := await client.get("/readyz")).status_code == 200:
            await asyncio.sleep(0.01)
        unready_s = time.monotonic() - began
    assert answer.json() == {"status": "draining"}
    await asyncio.sleep(0.3)
    stop.set()
    await load
    assert set(outcomes.codes) == {(200, None), (503, "draining")} and outcomes.broken == []
    assert await asyncio.to_thread(service.process.wait, 40) == 0
    ended_s = time.monotonic() - began
    print(f"\nunready after {unready_s:.2f} s, ended after {ended_s:.1f} s; it took {service.start_s:.1f} s to start")
    assert unready_s < 1
    _, alive = psutil.wait_procs(mine, timeout=10)
    assert alive == []
    assert folder is None or not folder.exists()
    lines = [json.loads(line) for line in service.log().splitlines()]
    ours = [line for line in lines if line["level"] == "ERROR" and line["logger"].startswith("clipdit")]
    assert [line for line in ours if line["logger"] != "clipdit_serve.reloading"] == []  # there one was to be refused
    assert os.environ.get("RAY_AUTH_TOKEN") is None
