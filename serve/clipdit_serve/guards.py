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

if TYPE_CHECKING:  # it brings PyTorch, and Ray's proxy has a use for guards alone
    from clipdit_serve.metrics import Metrics

logger = logging.getLogger(__name__)

HEALTH = frozenset(("/livez", "/readyz", "/health", "/healthz"))
OPEN = HEALTH | {"/"}
"""Paths that are answered without a key; whatever is not listed here needs it, routes to come and wrong paths included."""

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
"""What a caller may name a request; another name could forge log lines."""


class Authorisation:
    """Refuses requests without the key, before anything of them but the head is read."""

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and scope["path"] not in OPEN and not self._knows(scope):
            error = ApiError("invalid_api_key", "no API key, or another one; send the header `Authorization: Bearer KEY`")
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("utf-8", "replace"), self._key)


class Record:
    """Gives each request an id, and writes down what became of it."""

    def __init__(self, app: ASGIApp, metrics: "Metrics"):
        self._app, self._metrics = app, metrics

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
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # Ray Serve's way of saying that the caller left
            status, code = (status, code) if answered else (499, "client_closed_request")
            raise
        except Exception as error:
            logger.error("request %s failed: %s", id, error, exc_info=error, extra={"request_id": id})
            if answered:  # half an answer is sent: the server can only break the connection
                raise
            internal = ApiError("internal_error", f"a mistake of ours; the log has it under {id}")
            await internal.response()(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "other")  # never what the caller sent: each would be a metric of its own
            self._metrics.request(route, status, code, seconds)
            if scope["path"] not in HEALTH or status >= 500:
                fields = {"request_id": id, "route": route, "status": status, "error": code, "ms": round(1000 * seconds, 3)}
                logger.info("%s %s %s", scope["method"], route, f"{status} {code}" if code else status, extra=fields)
