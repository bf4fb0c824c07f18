"""Every error that a caller can meet, in one table: its code is a promise, its status follows from the code.

The body has OpenAI's shape, which its clients turn into exceptions:

    {"error": {"message": "...", "type": "invalid_request_error", "code": "unknown_field", "param": "colour"}}
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

if TYPE_CHECKING:  # it brings PyTorch, and Ray's proxy has a use for the table alone
    from clipdit.decoding import Fault


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One row of the table."""

    status: int
    type: str
    """As OpenAI's clients sort errors."""
    about: str
    """When it happens; for the documentation."""


INVALID, AUTHENTICATION, NOT_FOUND, RATE_LIMIT, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "rate_limit_error",
    "server_error",
)

ERRORS = {
    "unknown_field": Kind(status=400, type=INVALID, about="a field that this service does not know; `param` names it"),
    "invalid_value": Kind(status=400, type=INVALID, about="a field holds what cannot be used; `param` names it"),
    "missing_field": Kind(status=400, type=INVALID, about="a field that is needed is not there; `param` names it"),
    "malformed_body": Kind(status=400, type=INVALID, about="the body is not what its headers say"),
    "invalid_api_key": Kind(status=401, type=AUTHENTICATION, about="no key, or another one"),
    "not_found": Kind(status=404, type=NOT_FOUND, about="no such route"),
    "model_not_found": Kind(status=404, type=NOT_FOUND, about="another model than the one that is served"),
    "job_not_found": Kind(status=404, type=NOT_FOUND, about="no such job: it never was, has expired, or was deleted"),
    "method_not_allowed": Kind(status=405, type=INVALID, about="the route is there, for another method"),
    "not_acceptable": Kind(status=406, type=INVALID, about="`Accept` names nothing that can be sent"),
    "body_timeout": Kind(status=408, type=INVALID, about="the body did not arrive in time"),
    "job_not_done": Kind(status=409, type=INVALID, about="the job has no result: it waits, runs, or was cancelled"),
    "body_too_large": Kind(status=413, type=INVALID, about="the body is over the limit; it was not read to its end"),
    "unsupported_media_type": Kind(status=415, type=INVALID, about="`Content-Type` is neither an image nor a form"),
    "unsupported_image_format": Kind(
        status=415, type=INVALID, about="the upload is no PNG, JPEG or WebP, whatever its name says"
    ),
    "image_damaged": Kind(status=422, type=INVALID, about="the upload begins as an image and cannot be read to its end"),
    "image_empty": Kind(status=422, type=INVALID, about="the upload has 0 bytes"),
    "image_too_large": Kind(status=422, type=INVALID, about="more pixels than are taken, or a longer side"),
    "animated_not_supported": Kind(status=422, type=INVALID, about="the upload is an animation"),
    "image_timeout": Kind(status=422, type=INVALID, about="decoding took too long and was stopped"),
    "idempotency_key_reused": Kind(status=422, type=INVALID, about="the `Idempotency-Key` belongs to a job of other content"),
    "queue_full": Kind(
        status=429, type=RATE_LIMIT, about="too many requests wait already; `Retry-After` says when to come again"
    ),
    "too_many_jobs": Kind(
        status=429, type=RATE_LIMIT, about="no room for another job's result; fetch or delete some, or wait for `Retry-After`"
    ),
    "client_closed_request": Kind(status=499, type=INVALID, about="the caller left; only logs and metrics show it"),
    "internal_error": Kind(status=500, type=SERVER, about="a mistake of ours; the log has it under the request id"),
    "model_error": Kind(status=500, type=SERVER, about="the model failed on this image"),
    "loading": Kind(status=503, type=SERVER, about="the model is not ready yet"),
    "draining": Kind(status=503, type=SERVER, about="the service shuts down"),
    "model_unavailable": Kind(status=503, type=SERVER, about="the model died or hangs"),
    "deadline_exceeded": Kind(status=504, type=SERVER, about="no answer within the time limit"),
}

IMAGE_FAULTS: "dict[Fault, str]" = {
    "damaged": "image_damaged",
    "empty": "image_empty",
    "format": "unsupported_image_format",
    "large": "image_too_large",
    "animated": "animated_not_supported",
}
"""The code of what `clipdit.decoding` finds wrong with an upload."""

_STATUS_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
"""Codes of what the framework refuses by itself."""


class ApiError(Exception):
    """Answers the request with a row of the table.

    Args:
        code: of the row.
        message: one line: what was got, what was wanted, what to do.
        param: the field at fault.
        retry_after_s: whole seconds, for the header Retry-After.
    """

    def __init__(self, code: str, message: str, *, param: str | None = None, retry_after_s: int | None = None):
        super().__init__(message)
        self.code, self.message, self.param, self.retry_after_s = code, message, param, retry_after_s
        self.kind = ERRORS[code]

    def body(self) -> dict[str, str | None]:
        """What `error` is in the answer."""
        return {"message": self.message, "type": self.kind.type, "code": self.code, "param": self.param}

    def response(self) -> Response:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.kind.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        response = JSONResponse({"error": self.body()}, self.kind.status, headers)
        # the log line and the metrics read it there
        response.headers["x-clipdit-error"] = self.code
        return response


def install(app: FastAPI) -> None:
    """Every error of the application in the shape of the table, the framework's own included."""

    @app.exception_handler(ApiError)
    async def ours(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def frameworks(request: Request, error: HTTPException) -> Response:
        code = _STATUS_CODES.get(error.status_code, "malformed_body" if error.status_code < 500 else "internal_error")
        response = ApiError(code, f"{error.detail}: {request.method} {request.url.path}").response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        return field_error(error.errors()[0]).response()


def field_error(found: dict) -> ApiError:
    """The answer to one of pydantic's complaints."""
    name = ".".join(str(part) for part in found["loc"] if part not in ("query", "body", "header", "path"))
    match found["type"]:
        case "extra_forbidden":
            return ApiError("unknown_field", f"there is no field {name} here; leave it out", param=name)
        case "missing":
            return ApiError("missing_field", f"the field {name} is missing", param=name)
        case _:
            return ApiError("invalid_value", f"{name} is {found['input']!r}: {found['msg']}", param=name)
