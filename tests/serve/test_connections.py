"""Heads of requests: callers who send too much of one, or never end one. Bytes and a clock, and no socket."""

import asyncio

import pytest
import uvicorn
from uvicorn.server import ServerState

from clipdit_serve import connections
from clipdit_serve.connections import HEAD_BYTES, Connection

pytestmark = pytest.mark.anyio

CHUNK = 8192
HEAD = b"GET /livez HTTP/1.1\r\nHost: x\r\n"


class Wire(asyncio.Transport):
    """What a caller sees."""

    def __init__(self):
        super().__init__({"sockname": ("127.0.0.1", 80), "peername": ("127.0.0.1", 1)})
        self.answer, self.closed = b"", False

    def write(self, data: bytes) -> None:  # type: ignore[override]  (asyncio's is wider)
        self.answer += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


async def answer_nothing(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def connected() -> tuple[Connection, Wire]:
    config = uvicorn.Config(answer_nothing, http=Connection, h11_max_incomplete_event_size=HEAD_BYTES, log_config=None)
    config.load()
    made, wire = Connection(config, ServerState(), {}), Wire()
    made.connection_made(wire)
    return made, wire


@pytest.mark.parametrize("bomb", [b"X: " + b"a" * 20_000_000, b"X-Y: z\r\n" * 2_000_000], ids=["one header", "many headers"])
async def test_a_head_is_refused_before_64_kib_more_than_its_limit_are_read(bomb: bytes):
    made, wire = await connected()
    sent = HEAD + bomb
    taken = 0
    while not wire.closed:
        made.data_received(sent[taken : taken + CHUNK])
        taken += CHUNK
    assert wire.answer.startswith(b"HTTP/1.1 400 ")
    assert HEAD_BYTES < taken <= HEAD_BYTES + 64 * 2**10


@pytest.mark.parametrize("sent", [b"", HEAD], ids=["nothing", "no end"])
async def test_who_does_not_end_a_head_is_put_out_however_often_he_sends(sent: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    began = asyncio.get_running_loop().time()
    made, wire = await connected()
    made.data_received(sent) if sent else None
    async with asyncio.timeout(5):
        while not wire.closed:
            await asyncio.sleep(0.02)
            if sent:
                made.data_received(b"X")
    assert asyncio.get_running_loop().time() - began >= 0.3
    assert wire.answer == b""


async def test_neither_a_whole_head_nor_a_pause_between_requests_is_late_but_the_next_head_may_be(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(connections, "HEAD_S", 0.1)
    made, wire = await connected()
    for count in (1, 2):
        made.data_received(HEAD + b"\r\n")
        await asyncio.sleep(0.2)
        assert wire.answer.count(b"HTTP/1.1 204 ") == count and not wire.closed
    made.data_received(HEAD)
    await asyncio.sleep(0.2)
    assert wire.closed and wire.answer.count(b"HTTP/1.1 204 ") == 2
