"""POST /v1/translate: an image in, an image out, as plainly as HTTP allows."""

import base64
from collections import Counter
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from clipdit_serve.errors import ApiError
from clipdit_serve.fields import Format, TranslateFields, parse
from clipdit_serve.routes.documentation import OF_TRANSLATION, error_responses, form_body, image_bodies
from clipdit_serve.service import Ask, Picture, Service
from clipdit_serve.uploads import Reading, choose_format

OFFERED = ["image/png", "image/webp", "image/jpeg", "application/json"]
"""Media types of answers; the first where the caller takes any."""


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["translate"])

    @routes.post(
        "/v1/translate",
        summary="Translate an image",
        response_class=Response,
        responses=error_responses(*OF_TRANSLATION)
        | {200: {"content": {type: {} for type in OFFERED}, "description": "The image"}},
        openapi_extra={
            "requestBody": {"required": True, "content": image_bodies() | {"multipart/form-data": form_body(TranslateFields)}}
        },
    )
    async def translate(request: Request, query: Annotated[TranslateFields, Query()]) -> Response:
        """The image as the body, its settings in the query; or a form with all of them. `Accept` chooses the answer's format:
        the bytes of a PNG, WebP or JPEG, or JSON with the image in base64."""
        refuse_repeats(request)
        media_type = choose_format(request.headers.get("accept"), OFFERED)
        service.refuse_early(early_variant(service, request, query))
        with service.reader.hold() as reading:
            image, ask = await read_ask(service, reading, request, query, format_of(media_type))
            picture = await service.translate(request, image, ask)
        return respond(picture, media_type)

    return routes


def refuse_repeats(request: Request) -> None:
    """ApiError for a query that names something twice."""
    for name, count in Counter(name for name, _ in request.query_params.multi_items()).items():
        if count > 1:
            raise ApiError("invalid_value", f"{name} is there {count} times; send it once", param=name)


def format_of(media_type: str) -> Format:
    """Of the image in an answer of this type."""
    formats: dict[str, Format] = {"image/webp": "webp", "image/jpeg": "jpeg"}
    return formats.get(media_type, "png")


async def read_ask(
    service: Service, reading: Reading, request: Request, query: TranslateFields, format: Format = "png"
) -> tuple[bytes, Ask]:
    """The upload of a request, and what is wanted of it, from query and form. ApiError for what cannot be."""
    body = await reading.form_or_image(request)
    fields = parse(TranslateFields, query.model_dump(exclude_unset=True) | body.fields)
    service.check_steps(fields.steps, "steps")
    ask = Ask(
        variant=service.variant(fields.model, fields.variant),
        seed=fields.seed,
        steps=fields.steps,
        guidance=fields.guidance,
        format=format,
        quality=fields.quality,
    )
    return body.image, ask


def early_variant(service: Service, request: Request, query: TranslateFields) -> str | None:
    """The variant of a request whose body is not read yet; None where that is a form, which may name one. ApiError for what is
    not served."""
    named = query.variant is not None or query.model not in (None, service.settings.model_name)
    if not named and request.headers.get("content-type", "").lower().startswith("multipart/"):
        return None
    return service.variant(query.model, query.variant)


def respond(picture: Picture, media_type: str) -> Response:
    """A picture as the body, or in JSON."""
    headers = answer_headers(picture)
    if media_type == "application/json":
        return JSONResponse(_described(picture), headers=headers)
    return Response(picture.data, media_type=media_type, headers=headers)


def answer_headers(picture: Picture) -> dict[str, str]:
    """Of every answer that holds an image."""
    return {
        "x-clipdit-model": picture.model,
        "x-clipdit-seed": str(picture.seed),
        "server-timing": picture.server_timing,
        "vary": "accept",
    }


def _described(picture: Picture) -> dict:
    sampling = picture.answer.sampling
    return {
        "model": picture.model,
        "seed": picture.seed,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "width": picture.width,
        "height": picture.height,
        "format": picture.format,
        "notes": list(picture.notes),
        "b64_json": base64.b64encode(picture.data).decode("ascii"),
    }
