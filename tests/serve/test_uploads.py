"""Bodies that are too large, too slow, or no bodies, sent as raw ASGI so that it can be counted how much of them was read."""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator

import pytest
import torch
from serving import PNG, Identity, numbered, png, served

from clipdit.images import image_size
from clipdit_serve.app import create_app
from clipdit_serve.batching import InProcessEngine
from clipdit_serve.errors import ApiError
from clipdit_serve.settings import ServeSettings
from clipdit_serve.uploads import Reader, choose_format

pytestmark = pytest.mark.anyio

IMAGE = png(numbered(7))
LIMIT = 100_000
CHUNK = 8192


class Sent:
    """What a client saw of one request, and how many bytes of its body were taken."""

    def __init__(self):
        self.taken, self.status, self.body = 0, 0, b""

    @property
    def code(self) -> str:
        return json.loads(self.body)["error"]["code"]


async def send(app, path: str, headers: dict[str, str], chunks: AsyncIterator[bytes]) -> Sent:
    sent = Sent()

    async def receive() -> dict:
        async for chunk in chunks:
            sent.taken += len(chunk)
            return {"type": "http.request", "body": chunk, "more_body": True}
        return {"type": "http.request", "body": b"", "more_body": False}

    async def answer(message: dict) -> None:
        if message["type"] == "http.response.start":
            sent.status = message["status"]
        else:
            sent.body += message.get("body", b"")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }
    await app(scope, receive, answer)
    return sent


async def repeated(chunk: bytes, times: int, *, pause_s: float = 0.0) -> AsyncIterator[bytes]:
    for _ in range(times):
        await asyncio.sleep(pause_s)
        yield chunk


@pytest.fixture
async def app(decoder):
    settings = ServeSettings(max_body_bytes=LIMIT, body_timeout_s=0.3)
    engine = InProcessEngine(Identity, settings)
    application = create_app(engine, decoder, settings)
    async with application.router.lifespan_context(application):
        while engine.health().state != "ready":
            await asyncio.sleep(0.005)
        yield application


BOUNDARY = "multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'


@pytest.mark.parametrize("path", ["/v1/translate", "/v1/images/edits"])
async def test_a_body_that_says_it_is_too_large_is_refused_before_any_of_it_is_read(path: str, app):
    headers = {"content-type": BOUNDARY, "content-length": str(LIMIT + 1)}
    sent = await send(app, path, headers, repeated(bytes(CHUNK), 100))
    assert (sent.status, sent.code, sent.taken) == (413, "body_too_large", 0)


@pytest.mark.parametrize("headers", [{}, {"content-length": "10"}, {"content-length": "x"}])
async def test_a_body_that_says_nothing_or_lies_is_read_to_the_limit_and_one_chunk(headers: dict, app):
    sent = await send(app, "/v1/translate", headers | PNG, repeated(bytes(CHUNK), 1000))
    assert (sent.status, sent.code) == (413, "body_too_large")
    assert LIMIT < sent.taken <= LIMIT + CHUNK

    async def form() -> AsyncIterator[bytes]:
        yield PART
        async for chunk in repeated(bytes(CHUNK), 1000):
            yield chunk

    sent = await send(app, "/v1/images/edits", headers | {"content-type": BOUNDARY}, form())
    assert (sent.status, sent.code) == (413, "body_too_large")
    assert LIMIT < sent.taken <= LIMIT + CHUNK


async def test_a_body_that_drips_is_stopped_after_its_time(app):
    sent = await send(app, "/v1/translate", PNG, repeated(b"x", 1000, pause_s=0.05))
    assert (sent.status, sent.code) == (408, "body_timeout")
    assert sent.taken < 10


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (PART, "missing_field"),
        (b"--b\r\n\r\n\r\n--b--\r\n", "malformed_body"),
        (b"nothing like a form", "malformed_body"),
        (b"", "missing_field"),
        (b"".join(PART + b"x\r\n" for _ in range(10_000 // len(PART))) + b"--b--\r\n", "malformed_body"),
        (
            b"".join(b'--b\r\nContent-Disposition: form-data; name="seed"\r\n\r\n1\r\n' for _ in range(100)) + b"--b--\r\n",
            "malformed_body",
        ),
        (b'--b\r\nContent-Disposition: form-data; name="seed"\r\n\r\n' + b"1" * 70_000 + b"\r\n--b--\r\n", "malformed_body"),
        (PART + IMAGE + b"\r\n" + PART + IMAGE + b"\r\n--b--\r\n", "invalid_value"),
        (
            b'--b\r\nContent-Disposition: form-data; name="seed"\r\n\r\n1\r\n' * 2 + PART + IMAGE + b"\r\n--b--\r\n",
            "invalid_value",
        ),
        (b'--b\r\nContent-Disposition: form-data; name="seed"\r\n\r\n1\r\n--b--\r\n', "missing_field"),
    ],
)
async def test_a_form_that_cannot_be_read_is_a_400_that_says_why(body: bytes, code: str, app):
    async def whole() -> AsyncIterator[bytes]:
        yield body

    sent = await send(app, "/v1/translate", {"content-type": BOUNDARY}, whole())
    assert (sent.status, sent.code) == (400, code), sent.body


@pytest.mark.parametrize("part", [PART + b"x\r\n", b'--b\r\nContent-Disposition: form-data; name="seed"\r\n\r\n1\r\n'])
async def test_of_10000_parts_no_more_is_read_than_shows_that_there_are_too_many(part: bytes, decoder):
    parts = part * 10_000 + b"--b--\r\n"
    async with served(Identity(), ServeSettings(), decoder) as (client, _):

        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(parts), CHUNK):
                yield parts[start : start + CHUNK]

        for path in ("/v1/translate", "/v1/images/edits", "/v1/jobs"):
            sent = await send(client._transport.app, path, {"content-type": BOUNDARY}, chunks())  # type: ignore[attr-defined]  (httpx's annotation is the base class)
            assert (sent.status, sent.code) == (400, "malformed_body")
            assert sent.taken <= 64 * 2**10 < len(parts)


async def test_a_header_of_a_part_that_never_ends_is_refused_before_64_kib(app):
    async def chunks() -> AsyncIterator[bytes]:
        yield b"--b\r\nX: "
        async for chunk in repeated(b"a" * CHUNK, 1000):
            yield chunk

    sent = await send(app, "/v1/translate", {"content-type": BOUNDARY}, chunks())
    assert (sent.status, sent.code) in ((400, "malformed_body"), (413, "body_too_large"))
    assert sent.taken <= LIMIT + CHUNK


@pytest.mark.parametrize("type", ["", "text/plain", "application/json", "application/x-www-form-urlencoded", "imagepng"])
async def test_another_content_type_is_415_and_nothing_is_read(type: str, app):
    sent = await send(app, "/v1/translate", {"content-type": type}, repeated(bytes(CHUNK), 5))
    assert (sent.status, sent.code, sent.taken) == (415, "unsupported_media_type", 0)


async def test_while_the_queue_is_full_no_body_is_read(decoder):
    settings = ServeSettings(queue=1)
    async with served(Identity(), settings, decoder) as (client, engine):
        application = client._transport.app  # type: ignore[attr-defined]  (httpx's annotation is the base class)
        engine._admitted = 100
        sent = await send(application, "/v1/translate", PNG, repeated(bytes(CHUNK), 100))
        assert (sent.status, sent.code, sent.taken) == (429, "queue_full", 0)
        engine._admitted = 0


async def test_no_upload_is_written_to_a_disk(decoder, monkeypatch: pytest.MonkeyPatch):
    def to_disk(*_) -> None:
        raise AssertionError("a temporary file")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", to_disk)
    noise = torch.randint(0, 256, (3, 1500, 1000), dtype=torch.uint8)
    image = png(noise)
    assert len(image) > 4 * 2**20
    async with served(Identity(), ServeSettings(), decoder) as (client, _):
        for answer in (
            await client.post("/v1/translate", files={"image": ("a.png", image)}, headers={"accept": "image/jpeg"}),
            await client.post("/v1/translate", content=image, headers=PNG | {"accept": "image/jpeg"}),
        ):
            assert answer.status_code == 200
            assert image_size(answer.content) == (1500, 1000)


async def test_all_bodies_together_have_a_limit_and_give_their_room_back():
    reader = Reader(max_bytes=100, max_together=150, timeout_s=1)
    with reader.hold() as first, reader.hold() as second:
        reader.count(first, 100)
        reader.count(second, 50)
        with pytest.raises(ApiError) as caught:
            reader.count(second, 1)
        assert caught.value.code == "queue_full"
        with pytest.raises(ApiError) as caught:
            reader.count(first, 1)
        assert caught.value.code == "body_too_large"
    with reader.hold() as third:
        reader.count(third, 100)


@pytest.mark.parametrize(("accept", "wanted"), [(None, "a/b"), ("", "a/b"), ("c/*", "c/d"), ("c/d;q=0.1, a/b;q=0.2", "a/b")])
def test_the_format_is_the_one_that_is_liked_best(accept: str | None, wanted: str):
    assert choose_format(accept, ["a/b", "c/d"]) == wanted
