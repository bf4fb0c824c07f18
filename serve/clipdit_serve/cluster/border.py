"""Around Ray's HTTP proxy, in its process: bounds on heads and bodies, and no error that is not in our table.

The proxy reads a body to its end, whether or not its ingress wants it: without the bound here memory would be the caller's to
fill. Where an ingress is full or dies, the proxy answers with a sentence, or not at all; callers get what errors.py promises.
Ray finds this by the environment variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH.
"""

import re
import secrets

import uvicorn.config
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipdit_serve.connections import Connection
from clipdit_serve.errors import ApiError
from clipdit_serve.guards import REQUEST_ID
from clipdit_serve.settings import ServeSettings

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
IMPORT_PATH = f"{__name__}.middlewares"


def middlewares() -> list[Middleware]:
    """For Ray, which calls this in the process of its proxy before that listens."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{Connection.__module__}:{Connection.__qualname__}"  # no option of Ray's leads there
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
        if scope["type"] == "http":
            await _Passage(self, scope, receive, send).run()
        else:
            await self._app(scope, receive, send)

    async def pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """To the proxy."""
        if scope["path"] == "/-/routes":  # the only path of Ray's own that says more than whether it is well
            await ApiError("not_found", "no such route").response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def refusal(self, size: int, more: int) -> ApiError | None:
        """Of so many more bytes of a body of which so many came."""
        if size + more > self._max_bytes:
            return ApiError("body_too_large", f"the body is over {self._max_bytes} bytes; scale the image down")
        if self._held + more > self._max_together:
            return ApiError("queue_full", "too many uploads at the same time; come again in a second", retry_after_s=1)
        return None

    def hold(self, more: int) -> None:
        """So many bytes are in memory; a negative number are not any more."""
        self._held += more


class _Passage:
    """One request through the border."""

    def __init__(self, border: Border, scope: Scope, receive: Receive, send: Send):
        self._border, self._scope, self._receive, self._send = border, scope, receive, send
        given = Headers(scope=scope).get("x-request-id", "")
        self._id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        MutableHeaders(scope=scope)["x-request-id"] = self._id  # or the proxy gives it another one
        self._size = 0
        self._refused: ApiError | None = None
        self._answered = False
        """An answer has begun."""
        self._ours = False
        """It is not the proxy's."""

    async def run(self) -> None:
        length = Headers(scope=self._scope).get("content-length", "")
        if length.isdecimal() and (error := self._border.refusal(0, int(length))) is not None:
            await self._answer(error)
            return
        try:
            await self._border.pass_on(self._scope, self._take, self._give)
        except Exception:  # of the proxy, which answers nothing then: we do
            if self._answered:
                raise
        finally:
            self._border.hold(-self._size)
        if not self._answered:
            await self._answer(self._refused or _lost())

    async def _take(self) -> Message:
        """The next message to the proxy; where a body is refused, that its caller left."""
        if self._refused is None:
            message = await self._receive()
            more = len(message.get("body", b""))
            self._refused = self._border.refusal(self._size, more) if more else None
            if self._refused is None:
                self._size += more
                self._border.hold(more)
                return message
        return {"type": "http.disconnect"}

    async def _give(self, message: Message) -> None:
        """The next message from the proxy."""
        if self._ours:
            return
        if message["type"] == "http.response.start":
            error = self._refused
            if error is None and message["status"] >= 400 and not _is_an_answer_of_ours(message):
                error = _translated(message["status"], Headers(raw=message["headers"]))
            if error is not None:
                await self._answer(error)
                return
            self._answered = True
            MutableHeaders(raw=message["headers"])["x-request-id"] = self._id  # once: the proxy adds it to the application's
        await self._send(message)

    async def _answer(self, error: ApiError) -> None:
        self._answered = self._ours = True
        response = error.response()
        response.headers["x-request-id"] = self._id
        await response(self._scope, self._receive, self._send)


def _is_an_answer_of_ours(message: Message) -> bool:
    headers = Headers(raw=message["headers"])
    return "x-clipdit-error" in headers or headers.get("content-type") == "application/json"  # readiness is not an error


def _lost() -> ApiError:
    return ApiError("model_unavailable", "a part of the service was lost with this request in it; send it again", retry_after_s=1)


def _translated(status: int, headers: Headers) -> ApiError:
    """An error of the proxy's own."""
    if status == 429:
        after = headers.get("retry-after", "")
        seconds = max(1, int(after)) if re.fullmatch(r"[0-9]{1,6}", after) else 1
        return ApiError("queue_full", f"too many requests wait already; come again in {seconds} s", retry_after_s=seconds)
    if status == 404:
        return ApiError("not_found", "no such route")
    return _lost()
