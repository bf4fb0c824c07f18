import base64

import pytest
import torch
from serving import PNG, Gate, Identity, number_of, numbered, png, served, until

from clipdit.fake_backend import FakeBackend
from clipdit.images import encode_image, image_size, read_image
from clipdit.translator import Translator
from clipdit_serve.settings import ServeSettings

pytestmark = pytest.mark.anyio

IMAGE = png(numbered(77))


def code(answer) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


async def test_raw_and_form_give_what_the_translator_gives(decoder):
    wanted = Translator(FakeBackend()).translate_image(numbered(77), seed=5, steps=3, guidance=1.5)
    async with served(Translator(FakeBackend()), ServeSettings(), decoder) as (client, _):
        raw = await client.post("/v1/translate?seed=5&steps=3&guidance=1.5", content=IMAGE, headers=PNG)
        fields = {"seed": "5", "steps": "3", "guidance": "1.5"}
        form = await client.post("/v1/translate", files={"image": ("a.png", IMAGE)}, data=fields)
        listed = await client.post("/v1/translate?seed=5", files={"image[]": ("a", IMAGE)}, data={"steps": 3, "guidance": 1.5})
        bytes_only = await client.post(
            "/v1/translate?seed=5&steps=3&guidance=1.5", content=IMAGE, headers={"content-type": "application/octet-stream"}
        )
    for answer in (raw, form, listed, bytes_only):
        assert answer.status_code == 200, answer.text
        assert torch.equal(read_image(answer.content), wanted)


async def test_an_answer_has_the_size_of_its_upload_and_says_how_it_was_made(decoder):
    image = encode_image(torch.full((3, 50, 120), 90, dtype=torch.uint8))
    async with served(Translator(FakeBackend()), ServeSettings(model_name="edges"), decoder) as (client, _):
        answer = await client.post("/v1/translate?seed=12", content=image, headers=PNG)
        again = await client.post("/v1/translate", content=image, headers=PNG)
    assert image_size(answer.content) == (50, 120)
    assert answer.headers["x-clipdit-seed"] == "12"
    assert answer.headers["x-clipdit-model"].startswith("edges@") and len(answer.headers["x-clipdit-model"]) == 18
    names = [span.partition(";")[0] for span in answer.headers["server-timing"].split(", ")]
    assert names == ["decode", "queue", "batch", "model", "encode"]
    assert 0 <= int(again.headers["x-clipdit-seed"]) < 2**32


async def test_a_drawn_seed_makes_the_same_picture_again(decoder):
    async with served(Translator(FakeBackend()), ServeSettings(), decoder) as (client, _):
        first = await client.post("/v1/translate", content=IMAGE, headers=PNG)
        seed = first.headers["x-clipdit-seed"]
        again = await client.post(f"/v1/translate?seed={seed}", content=IMAGE, headers=PNG)
        other = await client.post("/v1/translate", content=IMAGE, headers=PNG)
    assert again.content == first.content
    assert other.headers["x-clipdit-seed"] != seed and other.content != first.content


@pytest.mark.parametrize(
    ("accept", "type"),
    [
        (None, "image/png"),
        ("*/*", "image/png"),
        ("image/*", "image/png"),
        ("image/webp", "image/webp"),
        ("image/jpeg, image/png;q=0.5", "image/jpeg"),
        ("text/html, image/webp;q=0.9, */*;q=0.8", "image/webp"),
        ("application/json", "application/json"),
    ],
)
async def test_accept_chooses_the_format(accept: str | None, type: str, decoder):
    headers = PNG if accept is None else PNG | {"accept": accept}
    async with served(Identity(), ServeSettings(), decoder) as (client, _):
        if accept is None:
            del client.headers["accept"]
        answer = await client.post("/v1/translate?seed=3&quality=100", content=IMAGE, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == type
    data = answer.content
    if type == "application/json":
        body = answer.json()
        described = {name: body[name] for name in ("seed", "steps", "guidance", "width", "height", "format", "notes")}
        assert described == {
            "seed": 3,
            "steps": 4,
            "guidance": 1.0,
            "width": 64,
            "height": 64,
            "format": "png",
            "notes": [],
        }
        data = base64.b64decode(body["b64_json"])
    difference = (read_image(data).float() - numbered(77).float()).abs().mean()
    assert difference <= (0 if data.startswith(b"\x89PNG") else 4)


@pytest.mark.parametrize("accept", ["text/html", "image/gif", "image/png;q=0"])
async def test_what_cannot_be_sent_is_406(accept: str, decoder):
    async with served(Identity(), ServeSettings(), decoder) as (client, _):
        answer = await client.post("/v1/translate", content=IMAGE, headers=PNG | {"accept": accept})
    assert code(answer) == (406, "not_acceptable", None)


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("colour=red", (400, "unknown_field", "colour")),
        ("url=http://localhost/a.png", (400, "unknown_field", "url")),
        ("seed=x", (400, "invalid_value", "seed")),
        ("seed=-1", (400, "invalid_value", "seed")),
        (f"seed={2**63}", (400, "invalid_value", "seed")),
        ("seed=1&seed=2", (400, "invalid_value", "seed")),
        ("steps=0", (400, "invalid_value", "steps")),
        ("steps=201", (400, "invalid_value", "steps")),
        ("steps=1.5", (400, "invalid_value", "steps")),
        ("guidance=nan", (400, "invalid_value", "guidance")),
        ("guidance=inf", (400, "invalid_value", "guidance")),
        ("quality=101", (400, "invalid_value", "quality")),
        ("model=another", (404, "model_not_found", "model")),
    ],
)
async def test_a_field_that_is_unknown_or_wrong_is_named(query: str, wanted: tuple, decoder):
    async with served(Identity(), ServeSettings(), decoder) as (client, _):
        assert code(await client.post(f"/v1/translate?{query}", content=IMAGE, headers=PNG)) == wanted
        name, _, value = query.partition("&")[0].partition("=")
        if "&" not in query:
            form = await client.post("/v1/translate", files={"image": ("a.png", IMAGE)}, data={name: value})
            assert code(form) == wanted


async def test_an_empty_field_counts_as_left_out(decoder):
    empty = {"seed": "", "steps": "", "guidance": "", "model": ""}
    async with served(Identity(), ServeSettings(), decoder) as (client, _):
        form = await client.post("/v1/translate", files={"image": ("a.png", IMAGE)}, data=empty)
        query = await client.post("/v1/translate", params=empty, content=IMAGE, headers=PNG)
        fields = {"seed": "", "num_inference_steps": "", "guidance_scale": "", "model": "", "prompt": ""}
        edit = await client.post("/v1/images/edits", files={"image": ("a.png", IMAGE)}, data=fields)
    assert [answer.status_code for answer in (form, query, edit)] == [200, 200, 200], (form.text, query.text)


async def test_seeds_at_the_ends_of_their_range_are_taken(decoder):
    async with served(Translator(FakeBackend()), ServeSettings(), decoder) as (client, _):
        for seed in (0, 2**63 - 1):
            answer = await client.post(f"/v1/translate?seed={seed}", content=IMAGE, headers=PNG)
            assert (answer.status_code, answer.headers["x-clipdit-seed"]) == (200, str(seed))


async def test_a_request_that_takes_too_long_is_504_and_its_place_is_free_again(decoder):
    gate = Gate()
    settings = ServeSettings(timeout_s=0.5, queue=1, max_batch=1, max_wait_ms=0)
    async with served(Identity(before=gate), settings, decoder) as (client, engine):
        answer = await client.post("/v1/translate", content=IMAGE, headers=PNG)
        assert code(answer) == (504, "deadline_exceeded", None)
        assert engine.idle
        gate.opened.set()
        await until(lambda: engine.health().running == 0)
        answer = await client.post("/v1/translate", content=IMAGE, headers=PNG)
        assert number_of(read_image(answer.content)) == 77


async def test_before_the_model_is_ready_requests_are_503_with_a_time_to_come_again(decoder):
    gate = Gate()

    def open_model():
        gate(torch.ones(1))
        return Identity()

    async with served(open_model, ServeSettings(), decoder, wait=False) as (client, engine):
        answer = await client.post("/v1/translate", content=IMAGE, headers=PNG)
        assert code(answer) == (503, "loading", None)
        assert int(answer.headers["retry-after"]) >= 1
        gate.opened.set()
        await until(lambda: engine.health().state == "ready")
        assert (await client.post("/v1/translate", content=IMAGE, headers=PNG)).status_code == 200
