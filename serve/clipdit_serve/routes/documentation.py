"""What the OpenAPI document says of bodies and errors that the routes read and raise by themselves."""

from typing import Any

from pydantic import BaseModel

from clipdit_serve.errors import ERRORS
from clipdit_serve.settings import FORMATS


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    code: str
    param: str | None


class ErrorAnswer(BaseModel):
    """The body of every error."""

    error: ErrorBody


def error_responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: these rows of the table, by status."""
    responses: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        kind = ERRORS[code]
        entry = responses.setdefault(kind.status, {"model": ErrorAnswer, "description": ""})
        entry["description"] = "; ".join(filter(None, [entry["description"], f"{code}: {kind.about}"]))
    return responses


OF_EVERY_ROUTE = ("invalid_api_key", "internal_error")
OF_JOBS = ("job_not_found", "job_not_done", "idempotency_key_reused", "too_many_jobs")
OF_TRANSLATION = tuple(
    code for code, kind in ERRORS.items() if kind.status not in (405, 499) and code not in ("not_found", *OF_JOBS)
)
"""What a route that translates may answer."""

BINARY = {"type": "string", "format": "binary"}


def form_body(fields: type[BaseModel]) -> dict[str, Any]:
    """A form of these fields and the file."""
    schema = fields.model_json_schema()
    properties = {"image": BINARY | {"description": "PNG, JPEG or WebP"}, **schema["properties"]}
    return {"schema": schema | {"properties": properties, "required": ["image", *schema.get("required", [])]}}


def image_bodies() -> dict[str, Any]:
    """The image itself, in each format."""
    return {f"image/{name.lower()}": {"schema": BINARY} for name in FORMATS}
