"""The official client is the judge."""

import base64

import openai
import pytest
import torch
from serving import Identity, numbered, png, served

from clipdit.fake_backend import FakeBackend
from clipdit.images import image_size, read_image
from clipdit.translator import Translator
from clipdit_serve.settings import ServeSettings

pytestmark = pytest.mark.anyio

IMAGE = png(numbered(77))


def openai_client(client) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="anything", base_url="http://test/v1", http_client=client, max_retries=0)


async def test_the_official_client_translates_an_image(decoder):
    wanted = Translator(FakeBackend()).translate_image(numbered(77), seed=5, steps=3)
    async with served(Translator(FakeBackend()), ServeSettings(), decoder) as (client, _):
        result = await openai_client(client).images.edit(
            image=("drawing.png", IMAGE, "image/png"),
            prompt="an emoji",
            model="clipdit",
            extra_body={"seed": 5, "num_inference_steps": 3},
        )
    assert torch.equal(read_image(base64.b64decode(result.data[0].b64_json)), wanted)
    assert result.created > 1_700_000_000
    assert result.output_format == "png"
    assert result.model_extra["seed"] == 5


async def test_the_official_client_sends_a_list_of_one_and_gets_another_format(decoder):
    async with served(Identity(), ServeSettings(), decoder) as (client, _):
        result = await openai_client(client).images.edit(
            image=[("drawing.png", IMAGE, "image/png")], prompt="", output_format="webp", output_compression=90, n=1, size="auto"
        )
    data = base64.b64decode(result.data[0].b64_json)
    assert data[8:12] == b"WEBP" and image_size(data) == (64, 64)
    assert result.model_extra["size"] if "size" in (result.model_extra or {}) else result.size == "64x64"


async def test_the_official_client_lists_and_finds_the_model(decoder):
    async with served(Identity(), ServeSettings(model_name="edges"), decoder) as (client, _):
        ours = openai_client(client)
        assert [model.id async for model in ours.models.list()] == ["edges"]
        assert (await ours.models.retrieve("edges")).object == "model"
        with pytest.raises(openai.NotFoundError) as caught:
            await ours.models.retrieve("another")
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("given", "error", "code", "param"),
    [
        ({"model": "dall-e-2"}, openai.NotFoundError, "model_not_found", "model"),
        ({"n": 2}, openai.BadRequestError, "invalid_value", "n"),
        ({"size": "1024x1024"}, openai.BadRequestError, "invalid_value", "size"),
        ({"response_format": "url"}, openai.BadRequestError, "invalid_value", "response_format"),
        ({"quality": "high"}, openai.BadRequestError, "invalid_value", "quality"),
        ({"background": "transparent"}, openai.BadRequestError, "invalid_value", "background"),
        ({"mask": ("mask.png", IMAGE)}, openai.BadRequestError, "unknown_field", "mask"),
        ({"user": "me"}, openai.BadRequestError, "unknown_field", "user"),
        ({"input_fidelity": "high"}, openai.BadRequestError, "unknown_field", "input_fidelity"),
        ({"extra_body": {"strength": 0.5}}, openai.BadRequestError, "unknown_field", "strength"),
        ({"extra_body": {"num_inference_steps": 0}}, openai.BadRequestError, "invalid_value", "num_inference_steps"),
        ({"extra_body": {"num_inference_steps": 1000}}, openai.BadRequestError, "invalid_value", "num_inference_steps"),
        ({"extra_query": {"seed": 1}}, openai.BadRequestError, "unknown_field", "seed"),
        ({"image": [("a.png", IMAGE), ("b.png", IMAGE)]}, openai.BadRequestError, "invalid_value", "image[]"),
        ({"image": ("a.gif", b"GIF89a" + bytes(20))}, openai.APIStatusError, "unsupported_image_format", "image"),
        ({"image": ("a.png", IMAGE[:50])}, openai.UnprocessableEntityError, "image_damaged", "image"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(given: dict, error: type, code: str, param: str, decoder):
    async with served(Identity(), ServeSettings(), decoder) as (client, _):
        with pytest.raises(error) as caught:
            await openai_client(client).images.edit(**({"image": ("a.png", IMAGE), "prompt": "x"} | given))
    assert (caught.value.code, caught.value.param) == (code, param)


async def test_a_body_that_is_no_form_is_refused(decoder):
    async with served(Identity(), ServeSettings(), decoder) as (client, _):
        answer = await client.post("/v1/images/edits", json={"image": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
        answer = await client.post("/v1/images/edits", files={"other": ("a.png", IMAGE)})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "other")
        answer = await client.post("/v1/images/edits", data={"image": "text"}, files={"x": b""})
        assert answer.status_code == 400
        answer = await client.post("/v1/images/edits", files={"prompt": (None, "only")})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "missing_field")
