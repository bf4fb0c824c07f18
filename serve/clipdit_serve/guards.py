"""What stands around every route, as plain ASGI: the key, the request id, the log line and the metrics of each request.

Not Starlette's BaseHTTPMiddleware, which hides from a route that its caller left.
"""

import asyncio
import hmac
import logging
import re
import secrets
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipdit_serve.errors import ApiError

if TYPE_CHECKING:  # they bring PyTorch, and Ray's proxy has a use for guards alone
    from clipdit_serve.metrics import Metrics
    from clipdit_serve.tracing import Traces

logger = logging.getLogger(__name__)

HEALTH = frozenset(("/livez", "/readyz", "/health", "/healthz"))
METRICS = "/metrics"

OPEN = HEALTH | {"/"}
"""Paths that are answered without a key; whatever is not listed here needs it, routes to come and wrong paths included."""

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
"""What a caller may name a request; another name could forge log lines."""


class Authorisation:
    """Refuses requests without the key, before anything of them but the head is read.

    Args:
        metrics_port: where nobody is asked for it; `Ports` sees to it that nothing else is there.
    """

    def __init__(self, app: ASGIApp, key: str, metrics_port: int | None = None):
        self._app, self._key, self._metrics_port = app, key.encode(), metrics_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and scope["path"] not in OPEN and not self._may(scope):
            error = ApiError("invalid_api_key", "no API key, or another one; send the header `Authorization: Bearer KEY`")
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may(self, scope: Scope) -> bool:
        if self._metrics_port is not None and _port(scope) == self._metrics_port:
            return True
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("utf-8", "replace"), self._key)


class OneLength:
    """Refuses a body that says its length in two ways, and ends the connection: a proxy in front may believe the other one, and
    what it takes for a body be a request to us (RFC 9112, 6.1)."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
            answer = ApiError("malformed_body", "both Content-Length and Transfer-Encoding; send one of them").response()
            answer.headers["connection"] = "close"
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)


class Ports:
    """Metrics on a port of their own, and there nothing else but health. The port is the one of the connection, not one that the
    caller names."""

    def __init__(self, app: ASGIApp, metrics_port: int):
        self._app, self._metrics_port = app, metrics_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            path, apart = scope["path"], _port(scope) == self._metrics_port
            if (path == METRICS) != apart and not (apart and path in HEALTH):
                said = f"there are {METRICS} and health here" if apart else "metrics are at a port of their own, --metrics-port"
                await ApiError("not_found", said).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Record:
    """Gives each request an id, and writes down what became of it."""

    def __init__(self, app: ASGIApp, metrics: "Metrics", traces: "Traces"):
        self._app, self._metrics, self._traces = app, metrics, traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = id
        status, code, answered = 500, None, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, code, answered
            if message["type"] == "http.response.start":
                status, answered = message["status"], True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = id
                code = headers.get("x-clipdit-error")
                self._traces.request(scope, id=id, route=_route(scope), code=code)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # Ray Serve's way of saying that the caller left
            status, code = (status, code) if answered else (499, "client_closed_request")
            raise
        except Exception as error:  # a mistake of ours, of any kind: the caller gets a row of the table, and the log the rest
            logger.error("request %s failed: %s", id, error, exc_info=error, extra={"request_id": id})
            if answered:  # half an answer is sent: the server can only break the connection
                raise
            internal = ApiError("internal_error", f"a mistake of ours; the log has it under {id}")
            await internal.response()(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - began
            route = _route(scope)
            self._metrics.request(route, status, code, seconds)
            if scope["path"] not in HEALTH or status >= 500:
                fields = {"request_id": id, "route": route, "status": status, "error": code, "ms": round(1000 * seconds, 3)}
                logger.info("%s %s %s", scope["method"], route, f"{status} {code}" if code else status, extra=fields)


def _route(scope: Scope) -> str:
    """Never what the caller sent: each would be a metric of its own."""
    return getattr(scope.get("route"), "path", "other")


def _port(scope: Scope) -> int | None:
    """At which it came in."""
    return scope["server"][1] if scope.get("server") else None
