"""Bodies: read up to their limit and no further, kept in memory and never on a disk; and which formats the caller takes.

FastAPI's own limit (`max_body_size`) is not used: where Content-Length is over it, it answers in plain text, past the error
table.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header, parse_options_header

from clipdit_serve.errors import ApiError

MAX_FIELDS, MAX_FILES, MAX_FIELD_BYTES = 32, 4, 64 * 2**10
"""Of a form. More files than the one that is wanted, so that those too many can be named."""

IMAGE_NAMES = ("image", "image[]")
"""What the file of a form may be called; the second is how OpenAI's clients name one of a list."""


@dataclass(frozen=True, kw_only=True)
class Body:
    """What a caller sent."""

    image: bytes
    fields: dict[str, Any]
    """The other parts of a form; empty where the body is the image itself."""


class Reader:
    """Reads bodies.

    Args:
        max_bytes: of one body.
        max_together: of all bodies that are held at the same time; whoever comes then gets `queue_full`.
        timeout_s: in which a body must arrive.
    """

    def __init__(self, *, max_bytes: int, max_together: int, timeout_s: float):
        self._max_bytes, self._max_together, self._timeout_s = max_bytes, max_together, timeout_s
        self._held = 0

    @contextmanager
    def hold(self) -> Iterator["Reading"]:
        """Around the life of one body: its bytes count as held until then."""
        reading = Reading(self)
        try:
            yield reading
        finally:
            self._held -= reading.size

    def count(self, reading: "Reading", more: int) -> None:
        """ApiError where a body, or all together, become too large."""
        if reading.size + more > self._max_bytes:
            raise self.too_large()
        if self._held + more > self._max_together:
            raise ApiError("queue_full", "too many uploads at the same time; come again in a second", retry_after_s=1)
        self._held += more
        reading.size += more

    def too_large(self) -> ApiError:
        return ApiError("body_too_large", f"the body is over {self._max_bytes} bytes; scale the image down")

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    @property
    def timeout_s(self) -> float:
        return self._timeout_s


class Reading:
    """One body on its way in."""

    def __init__(self, reader: Reader):
        self._reader, self.size = reader, 0

    async def form(self, request: Request) -> Body:
        """A form with the image as a file. ApiError for any other body."""
        type, _ = parse_options_header(request.headers.get("content-type"))
        if type != "multipart/form-data":
            raise ApiError("unsupported_media_type", f"Content-Type is {type or 'missing'}; wanted multipart/form-data")
        return await self._in_time(self._form(request))

    async def form_or_image(self, request: Request) -> Body:
        """A form with the image as a file, or the image itself. ApiError for any other body."""
        type, _ = parse_options_header(request.headers.get("content-type"))
        if type == "multipart/form-data":
            return await self._in_time(self._form(request))
        if type.startswith("image/") or type == "application/octet-stream":
            return Body(image=await self._in_time(self._whole(request)), fields={})
        raise ApiError(
            "unsupported_media_type",
            f"Content-Type is {type or 'missing'}; wanted image/png, image/jpeg, image/webp or multipart/form-data",
        )

    async def _in_time(self, body: Any) -> Any:
        try:
            async with asyncio.timeout(self._reader.timeout_s):
                return await body
        except TimeoutError:
            raise ApiError("body_timeout", f"the body did not arrive within {self._reader.timeout_s:g} s") from None
        except ClientDisconnect:
            raise ApiError("client_closed_request", "the caller left while sending") from None
        except MultiPartException as error:
            raise ApiError("malformed_body", f"the form cannot be read: {error.message}") from None

    async def _stream(self, request: Request) -> AsyncGenerator[bytes, None]:
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._reader.max_bytes:
            raise self._reader.too_large()
        async for chunk in request.stream():
            self._reader.count(self, len(chunk))
            yield chunk

    async def _whole(self, request: Request) -> bytes:
        return b"".join([chunk async for chunk in self._stream(request)])

    async def _form(self, request: Request) -> Body:
        parser = MultiPartParser(
            request.headers,
            self._stream(request),
            max_files=MAX_FILES,
            max_fields=MAX_FIELDS,
            max_part_size=MAX_FIELD_BYTES,
        )
        parser.spool_max_size = self._reader.max_bytes + 1  # so that no upload is written to a temporary file
        form = await parser.parse()
        return await _sorted_out(form.multi_items())


async def _sorted_out(items: list[tuple[str, UploadFile | str]]) -> Body:
    """The image and the fields of a form, each of which may be there once."""
    image: bytes | None = None
    fields: dict[str, str] = {}
    for name, value in items:
        if isinstance(value, UploadFile) and name not in IMAGE_NAMES:
            raise ApiError("unknown_field", f"there is no file {name} here; leave it out", param=name)
        if name in IMAGE_NAMES:
            if not isinstance(value, UploadFile):
                raise ApiError("invalid_value", f"{name} is text; wanted a file", param=name)
            if image is not None:
                raise ApiError("invalid_value", "more than one image; send one a request", param=name)
            image = await value.read()
        elif name in fields:
            raise ApiError("invalid_value", f"{name} is there twice; send it once", param=name)
        else:
            fields[name] = str(value)
    if image is None:
        raise ApiError("missing_field", "the file image is missing", param="image")
    return Body(image=image, fields=fields)


def choose_format(accept: str | None, offered: list[str]) -> str:
    """The media type of `offered` that the caller likes best, the first of them where he says nothing. ApiError when he takes
    none."""
    wanted = parse_accept_header(accept or "*/*", MIMEAccept)
    chosen = wanted.best_match(offered)
    if chosen is None:
        raise ApiError("not_acceptable", f"Accept is {accept}; there are {', '.join(offered)}")
    return chosen
