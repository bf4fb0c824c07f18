"""What stands around Ray's proxy, with another application in the proxy's place."""

from collections.abc import Callable

import httpx2
import pytest
import uvicorn.config
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from clipdit_serve.cluster.border import Border, middlewares
from clipdit_serve.connections import Connection
from clipdit_serve.errors import ApiError

pytestmark = pytest.mark.anyio

SEEN: list[Request] = []


async def echo_length(request: Request) -> Response:
    SEEN.append(request)
    return PlainTextResponse(str(len(await request.body())))


def proxied(answer: Callable, **limits: int) -> httpx2.AsyncClient:
    """A client of a proxy that answers with what `answer` makes of a request."""

    async def app(scope, receive, send) -> None:
        response = await answer(Request(scope, receive))
        if response is not None:
            await response(scope, receive, send)

    border = Border(app, **{"max_bytes": 1000, "max_together": 1500} | limits)
    transport = httpx2.ASGITransport(border, raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url="http://test")


async def chunks(size: int):
    for _ in range(size // 100):
        yield bytes(100)


async def test_a_body_within_the_limit_passes_as_it_is():
    async with proxied(echo_length) as client:
        assert (await client.post("/", content=bytes(1000))).text == "1000"
        assert (await client.post("/", content=chunks(1000))).text == "1000"


async def test_a_body_over_the_limit_is_refused_with_and_without_its_length_said():
    async def gives_up(request: Request) -> Response | None:
        with pytest.raises(ClientDisconnect):
            await request.body()
        return None

    for content, answer in ((bytes(1001), echo_length), (chunks(2000), gives_up)):
        async with proxied(answer) as client:
            refused = await client.post("/", content=content, headers={"x-request-id": "mine"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
        assert refused.headers.get_list("x-request-id") == ["mine"]


async def test_bodies_that_are_answered_do_not_count_any_more():
    async with proxied(echo_length, max_together=1000) as client:
        for _ in range(5):
            assert (await client.post("/", content=chunks(900))).status_code == 200


@pytest.mark.parametrize(
    ("status", "headers", "wanted"),
    [
        (429, {"retry-after": "7"}, (429, "queue_full", "7")),
        (429, {}, (429, "queue_full", "1")),
        (503, {}, (503, "model_unavailable", "1")),
        (500, {}, (503, "model_unavailable", "1")),
        (404, {}, (404, "not_found", None)),
    ],
)
async def test_an_error_of_the_proxy_becomes_one_of_the_table(status: int, headers: dict, wanted: tuple):
    async def answer(request: Request) -> Response:
        return PlainTextResponse("Request dropped due to backpressure", status, headers)

    async with proxied(answer) as client:
        got = await client.get("/v1/models")
    assert (got.status_code, got.json()["error"]["code"], got.headers.get("retry-after")) == wanted
    assert got.headers["x-clipdit-error"] == wanted[1]


async def test_no_answer_and_an_exception_of_the_proxy_become_a_503():
    async def nothing(request: Request) -> None:
        return None

    async def raises(request: Request) -> None:
        raise RuntimeError("the replica died")

    for answer in (nothing, raises):
        async with proxied(answer) as client:
            got = await client.get("/v1/models")
        assert (got.status_code, got.json()["error"]["code"]) == (503, "model_unavailable")


async def test_an_answer_of_the_application_passes_as_it_is_but_for_a_second_request_id():
    async def answer(request: Request) -> Response:
        response = ApiError("queue_full", "full", retry_after_s=3).response() if request.url.path == "/full" else None
        response = response or JSONResponse({"status": "draining"}, 503)
        response.headers["x-request-id"] = request.headers["x-request-id"]
        response.raw_headers.append((b"x-request-id", request.headers["x-request-id"].encode()))
        return response

    async with proxied(answer) as client:
        full = await client.get("/full")
        assert (full.status_code, full.headers["retry-after"], full.json()["error"]["message"]) == (429, "3", "full")
        ready = await client.get("/readyz", headers={"x-request-id": "bad id\tforged"})
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        (id,) = ready.headers.get_list("x-request-id")
        assert len(id) == 32 and int(id, 16) >= 0


async def test_rays_list_of_routes_is_not_shown():
    async with proxied(echo_length) as client:
        assert (await client.get("/-/routes")).status_code == 404
        assert (await client.get("/-/healthz")).status_code == 200


def test_rays_proxy_takes_heads_as_the_service_of_one_process_does(monkeypatch):
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    assert [middleware.cls for middleware in middlewares()] == [Border]
    config = uvicorn.Config(lambda scope: None)
    config.load()
    assert config.http_protocol_class is Connection
