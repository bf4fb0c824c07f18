"""Several ways to run one model in one service."""

import asyncio

import openai
import pytest
import torch
from serving import PNG, Gate, Identity, number_of, numbered, png, served, served_variants, until

from clipdit.images import read_image
from clipdit_serve.commands.serve import _backends
from clipdit_serve.settings import ServeSettings
from clipdit_serve.variants import variant_name

pytestmark = pytest.mark.anyio

IMAGE = png(numbered(77))
TWO = {"int8": lambda: Identity(fingerprint="8" * 64), "fp32": lambda: Identity(fingerprint="f" * 64)}
NAMED = ["clipdit", "clipdit:int8", "clipdit:fp32"]


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("", "clipdit:int8@888888888888"),
        ("variant=", "clipdit:int8@888888888888"),
        ("variant=int8", "clipdit:int8@888888888888"),
        ("variant=fp32", "clipdit:fp32@ffffffffffff"),
        ("model=clipdit", "clipdit:int8@888888888888"),
        ("model=clipdit:fp32", "clipdit:fp32@ffffffffffff"),
        ("model=clipdit:fp32&variant=fp32", "clipdit:fp32@ffffffffffff"),
        ("model=clipdit&variant=fp32", "clipdit:fp32@ffffffffffff"),
    ],
)
async def test_the_first_answers_unless_a_caller_names_another(query: str, wanted: str, decoder):
    async with served_variants(TWO, ServeSettings(), decoder) as (client, _):
        raw = await client.post(f"/v1/translate?{query}", content=IMAGE, headers=PNG)
        fields = dict(part.split("=") for part in query.split("&") if part)
        form = await client.post("/v1/translate", files={"image": ("a.png", IMAGE)}, data=fields)
        described = await client.post(f"/v1/translate?{query}", content=IMAGE, headers=PNG | {"accept": "application/json"})
        job = await client.post(f"/v1/jobs?{query}", content=IMAGE, headers=PNG)
        path = job.headers["location"]
        assert (await client.get(f"{path}/events")).text.count("event: done\n") == 1
        result = await client.get(f"{path}/result")
    assert [answer.headers["x-clipdit-model"] for answer in (raw, form, described, result)] == [wanted] * 4
    assert described.json()["model"] == wanted
    assert number_of(read_image(result.content)) == 77


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("variant=fp8", (400, "invalid_value", "variant")),
        ("variant=int8&model=clipdit:fp32", (400, "invalid_value", "variant")),
        ("model=clipdit:fp8", (404, "model_not_found", "model")),
        ("model=fp32", (404, "model_not_found", "model")),
    ],
)
async def test_what_is_not_served_is_said_with_what_is(query: str, wanted: tuple, decoder):
    async with served_variants(TWO, ServeSettings(), decoder) as (client, _):
        for path in ("/v1/translate", "/v1/jobs"):
            raw = await client.post(f"{path}?{query}", content=IMAGE, headers=PNG)
            fields = dict(part.split("=") for part in query.split("&"))
            form = await client.post(path, files={"image": ("a.png", IMAGE)}, data=fields)
            for answer in (raw, form):
                error = answer.json()["error"]
                assert (answer.status_code, error["code"], error["param"]) == wanted
                assert "fp32" in error["message"]


async def test_the_official_client_lists_them_and_names_one_as_its_model(decoder):
    async with served_variants(TWO, ServeSettings(), decoder) as (client, _):
        ours = openai.AsyncOpenAI(api_key="anything", base_url="http://test/v1", http_client=client, max_retries=0)
        assert [model.id async for model in ours.models.list()] == NAMED
        for name in NAMED:
            assert (await ours.models.retrieve(name)).id == name
        edit = ours.images.with_raw_response.edit
        answer = await edit(image=("a.png", IMAGE), prompt="", model="clipdit:fp32")
        assert answer.headers["x-clipdit-model"] == "clipdit:fp32@ffffffffffff"
        with pytest.raises(openai.NotFoundError):
            await edit(image=("a.png", IMAGE), prompt="", model="clipdit:fp8")
        with pytest.raises(openai.BadRequestError) as caught:  # OpenAI's route says it with the model's name
            await edit(image=("a.png", IMAGE), prompt="", extra_body={"variant": "fp32"})
        assert caught.value.code == "unknown_field"


async def test_of_one_variant_nothing_is_told(decoder):
    async with served(Identity(), ServeSettings(), decoder) as (client, _):
        answer = await client.post("/v1/translate?variant=fp32", content=IMAGE, headers=PNG)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", "variant")
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["clipdit"]
        assert "variants" not in (await client.get("/readyz?verbose")).json()
        assert "variant=" not in (await client.get("/metrics")).text
        assert "<option>" not in (await client.get("/")).text
    async with served_variants({"int8": TWO["int8"]}, ServeSettings(), decoder) as (client, _):
        for query in ("", "?variant=int8"):
            answer = await client.post(f"/v1/translate{query}", content=IMAGE, headers=PNG)
            assert answer.headers["x-clipdit-model"] == "clipdit@888888888888"


async def test_an_idempotency_key_knows_the_default_by_its_name(decoder):
    async with served_variants(TWO, ServeSettings(), decoder) as (client, _):
        headers = PNG | {"idempotency-key": "k"}
        paths = [f"/v1/jobs?seed=1{more}" for more in ("", "&variant=int8", "&model=clipdit")]
        jobs = [(await client.post(path, content=IMAGE, headers=headers)).headers["location"] for path in paths]
        assert len(set(jobs)) == 1
        other = await client.post("/v1/jobs?seed=1&variant=fp32", content=IMAGE, headers=headers)
        assert other.json()["error"]["code"] == "idempotency_key_reused"


async def test_each_has_a_queue_of_its_own_and_a_full_one_keeps_nobody_from_the_other(decoder):
    gate, model = Gate(), Identity(fingerprint="f" * 64)
    models = {"slow": lambda: Identity(before=gate), "fp32": lambda: model}
    async with served_variants(models, ServeSettings(queue=1, max_batch=1), decoder) as (client, variants):
        asking = [asyncio.create_task(client.post("/v1/translate", content=IMAGE, headers=PNG)) for _ in range(2)]
        await until(gate.reached.is_set)
        await until(lambda: variants["slow"].health().waiting == 1)
        assert (await client.post("/v1/translate", content=IMAGE, headers=PNG)).status_code == 429
        form = {"files": {"image": ("a.png", IMAGE)}}
        assert (await client.post("/v1/translate", **form)).status_code == 429
        assert (await client.post("/v1/translate", **form, data={"variant": "fp32"})).status_code == 200
        assert (await client.post("/v1/translate?variant=fp32", content=IMAGE, headers=PNG)).status_code == 200
        assert (await client.post("/v1/images/edits", **form, data={"model": "clipdit:fp32"})).status_code == 200
        assert (await client.get("/readyz")).json() == {"status": "full"}
        gate.opened.set()
        assert [(await task).status_code for task in asking] == [200, 200]
        metrics = (await client.get("/metrics")).text
    assert model.batches == [1, 1, 1]
    assert 'clipdit_batch_size_sum{variant="fp32"} 3.0' in metrics and 'clipdit_batch_size_sum{variant="slow"} 2.0' in metrics
    assert 'clipdit_queue_depth{variant="slow"} 0.0' in metrics
    assert 'clipdit_model_info{backend="fake",precision="float32",revision="ffffffffffff",variant="fp32"}' in metrics


async def test_ready_when_all_are_warm_and_then_as_long_as_the_default_is(decoder):
    loading, hanging = Gate(), Gate()

    def slowly() -> Identity:
        loading(torch.ones(1))
        return Identity(before=hanging)

    async with served_variants(TWO | {"slow": slowly}, ServeSettings(hang_s=0.3), decoder, wait=False) as (client, variants):
        await until(lambda: variants["int8"].health().state == "ready")
        assert (await client.get("/readyz")).json() == {"status": "loading"}
        loading.opened.set()
        await until(lambda: variants.health().state == "ready")
        asking = asyncio.create_task(client.post("/v1/translate?variant=slow", content=IMAGE, headers=PNG))
        await until(lambda: variants["slow"].health().state == "hung")
        answer = await client.post("/v1/translate?variant=slow", content=IMAGE, headers=PNG)
        assert answer.json()["error"]["code"] == "model_unavailable"
        verbose = await client.get("/readyz?verbose")
        assert verbose.status_code == 200 and verbose.json()["model"] == "clipdit:int8@888888888888"
        assert {name: told["state"] for name, told in verbose.json()["variants"].items()} == {
            "int8": "ready",
            "fp32": "ready",
            "slow": "hung",
        }
        hanging.opened.set()
        assert (await asking).status_code == 200


async def test_one_that_died_is_not_alive_while_the_default_still_answers(decoder):
    def die(images: torch.Tensor) -> None:
        raise SystemExit

    models = TWO | {"dying": lambda: Identity(before=die)}
    async with served_variants(models, ServeSettings(), decoder) as (client, variants):
        assert (await client.get("/livez")).status_code == 200
        await client.post("/v1/translate?variant=dying", content=IMAGE, headers=PNG)
        await until(lambda: variants.dead)
        assert (await client.get("/livez")).status_code == 503
        assert (await client.get("/readyz")).status_code == 200
        assert (await client.post("/v1/translate", content=IMAGE, headers=PNG)).status_code == 200


async def test_the_page_offers_them_in_their_order(decoder):
    models = {'a"<b>': TWO["int8"], "fp32": TWO["fp32"]}
    async with served_variants(models, ServeSettings(), decoder) as (client, _):
        text = (await client.get("/")).text
    assert '<select id="variant"><option>a&quot;&lt;b&gt;</option><option>fp32</option></select>' in text


def test_variants_are_called_what_a_caller_can_tell_apart():
    words = {"eager": "eager", "eager:bf16": "eager-bf16", "onnx:onnx-int8": "onnx-int8"}
    words["tensorrt-rtx:tensorrt-rtx-fp16"] = "tensorrt-rtx-fp16"
    assert {word: variant_name(word) for word in words} == words
    assert _backends(None) == {"": None}
    assert list(_backends("onnx:onnx-int8,eager").items()) == [("onnx-int8", "onnx:onnx-int8"), ("eager", "eager")]
    for wrong in ("eager,eager", "eager,", ""):
        with pytest.raises(ValueError, match="wanted names with commas between, each once"):
            _backends(wrong)
