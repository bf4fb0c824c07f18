"""Around Ray's HTTP proxy, in its process: a bound on bodies, and no error that is not in our table.

The proxy reads a body to its end, whether or not its ingress wants it: without the bound here memory would be the caller's to
fill. Where an ingress is full or dies, the proxy answers with a sentence, or not at all; callers get what errors.py promises them.
Ray finds this by the environment variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH.
"""

import re
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipdit_serve.errors import ApiError
from clipdit_serve.settings import ServeSettings

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
IMPORT_PATH = f"{__name__}.middlewares"

OURS = b"x-clipdit-error"
"""A header of every error that an application of ours answers with."""


def middlewares() -> list[Middleware]:
    """For Ray."""
    settings = ServeSettings()
    return [Middleware(Border, max_bytes=settings.max_body_bytes, max_together=settings.max_bodies_bytes)]


class Border:
    """Args:
    max_bytes: of one body.
    max_together: of all bodies whose requests are not answered yet.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_together: int):
        self._app, self._max_bytes, self._max_together = app, max_bytes, max_together
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] == "/-/routes":  # the only path of Ray's own that says more than whether it is well
            await ApiError("not_found", "no such route").response()(scope, receive, send)
        else:
            await _Passage(self, scope, receive, send).run()


class _Passage:
    """One request through the border."""

    def __init__(self, border: Border, scope: Scope, receive: Receive, send: Send):
        self._border, self._scope, self._receive, self._send = border, scope, receive, send
        self._size = 0
        self._refused: ApiError | None = None
        self._answered = self._replaced = False

    async def run(self) -> None:
        border = self._border
        length = Headers(scope=self._scope).get("content-length", "")
        if length.isdecimal() and int(length) > border._max_bytes:
            await self._answer(self._too_large())
            return
        try:
            await border._app(self._scope, self._take, self._give)
        except Exception:
            if self._answered:
                raise
        finally:
            border._held -= self._size
        if not self._answered:
            await self._answer(self._refused or _lost())

    async def _take(self) -> Message:
        """The next message to the proxy; where a body is too large, that its caller left."""
        message: Message = {"type": "http.disconnect"} if self._refused else await self._receive()
        more = len(message.get("body", b""))
        if self._size + more > self._border._max_bytes:
            self._refused = self._too_large()
        elif self._border._held + more > self._border._max_together:
            self._refused = ApiError("queue_full", "too many uploads at the same time; come again in a second", retry_after_s=1)
        else:
            self._size += more
            self._border._held += more
            return message
        return {"type": "http.disconnect"}

    async def _give(self, message: Message) -> None:
        """The next message from the proxy."""
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            names = {name for name, _ in message["headers"]}
            if self._refused is not None:
                self._replaced = True
                await self._answer(self._refused)
                return
            if message["status"] >= 400 and OURS not in names and b"x-request-id" not in names:
                self._replaced = True
                await self._answer(_translated(message))
                return
            self._answered = True
        await self._send(message)

    async def _answer(self, error: ApiError) -> None:
        self._answered = True
        await error.response()(self._scope, self._receive, self._send)

    def _too_large(self) -> ApiError:
        return ApiError("body_too_large", f"the body is over {self._border._max_bytes} bytes; scale the image down")


def _lost() -> ApiError:
    return ApiError("model_unavailable", "a part of the service was lost with this request in it; send it again", retry_after_s=1)


def _translated(message: Message) -> ApiError:
    """An error of the proxy's own."""
    headers: dict[bytes, Any] = dict(message["headers"])
    after = headers.get(b"retry-after", b"")
    if message["status"] == 429:
        seconds = int(after) if re.fullmatch(rb"\d{1,6}", after) else 1
        return ApiError("queue_full", f"too many requests wait already; come again in {seconds} s", retry_after_s=max(1, seconds))
    if message["status"] == 404:
        return ApiError("not_found", "no such route")
    return _lost()
