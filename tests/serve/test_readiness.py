"""/readyz and /livez tell the truth within seconds when the model hangs, dies or runs out of memory."""

import asyncio
import time

import pytest
import torch
from serving import PNG, Gate, Identity, numbered, png, served, until

from clipdit_serve.settings import ServeSettings

pytestmark = pytest.mark.anyio
IMAGE = png(numbered(7))


async def unready_after_s(client) -> tuple[float, dict]:
    began = time.monotonic()
    while (answer := await client.get("/readyz")).status_code == 200:
        assert time.monotonic() - began < 10
        await asyncio.sleep(0.05)
    assert int(answer.headers["retry-after"]) > 0
    return time.monotonic() - began, answer.json()


async def test_a_model_that_hangs_is_unready_within_5_seconds_alive_and_ready_again_when_it_goes_on(decoder):
    gate = Gate()
    async with served(Identity(before=gate), ServeSettings(), decoder) as (client, _):  # with the default hang_s
        asking = asyncio.create_task(client.post("/v1/translate", content=IMAGE, headers=PNG))
        await until(gate.reached.is_set)
        seconds, told = await unready_after_s(client)
        print(f"\nunready after {seconds:.1f} s")
        assert seconds < 5 and told == {"status": "hung"}
        assert (await client.get("/livez")).status_code == 200  # it may go on
        refused = await client.post("/v1/translate", content=IMAGE, headers=PNG)
        assert (refused.status_code, refused.headers["x-clipdit-error"]) == (503, "model_unavailable")
        gate.opened.set()
        assert (await asking).status_code == 200
        await until(lambda: True)
        assert (await client.get("/readyz")).status_code == 200


@pytest.mark.parametrize("how", [SystemExit, torch.AcceleratorError])
async def test_a_model_that_died_is_unready_and_not_alive_within_5_seconds(how: type[BaseException], decoder):
    def die(images: torch.Tensor) -> None:
        raise how("gone")

    async with served(Identity(before=die), ServeSettings(), decoder) as (client, _):
        answer = await client.post("/v1/translate", content=IMAGE, headers=PNG)
        assert (answer.status_code, answer.headers["x-clipdit-error"]) == (503, "model_unavailable")
        seconds, told = await unready_after_s(client)
        assert seconds < 5 and told == {"status": "dead"}
        alive = await client.get("/livez")
        assert (alive.status_code, alive.json()) == (503, {"status": "dead"})


async def test_out_of_memory_with_one_image_is_that_images_error_and_the_service_stays_ready(decoder):
    def too_much(images: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("out of memory")

    model = Identity(before=too_much)
    async with served(model, ServeSettings(), decoder) as (client, _):
        answer = await client.post("/v1/translate", content=IMAGE, headers=PNG)
        assert (answer.status_code, answer.headers["x-clipdit-error"]) == (500, "model_error")
        assert (await client.get("/readyz")).status_code == (await client.get("/livez")).status_code == 200
        model.before = lambda images: None
        assert (await client.post("/v1/translate", content=IMAGE, headers=PNG)).status_code == 200
