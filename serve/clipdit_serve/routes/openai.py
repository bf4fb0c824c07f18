"""What OpenAI's clients call: POST /v1/images/edits and GET /v1/models."""

import base64
import time

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from clipdit_serve.errors import ApiError
from clipdit_serve.fields import EditFields, parse
from clipdit_serve.routes.documentation import OF_EVERY_ROUTE, OF_TRANSLATION, error_responses, form_body
from clipdit_serve.routes.translate import answer_headers
from clipdit_serve.service import Ask, Service


class EditedImage(BaseModel):
    """One answer."""

    b64_json: str


class EditAnswer(BaseModel):
    """As OpenAI's, with the seed."""

    created: int
    """Seconds since 1970."""
    data: list[EditedImage]
    background: str = "opaque"
    output_format: str
    size: str
    """WIDTHxHEIGHT, pixels."""
    seed: int


class ModelCard(BaseModel):
    """What is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "clipdit"


class ModelList(BaseModel):
    """All that is served: the model, which is its default variant, and where there are several each of them."""

    object: str = "list"
    data: list[ModelCard]


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["openai"])
    started = int(time.time())

    @routes.post(
        "/v1/images/edits",
        summary="Translate an image, as OpenAI's clients ask for it",
        response_model=EditAnswer,
        responses=error_responses(*OF_TRANSLATION),
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": form_body(EditFields)}}},
    )
    async def edit(request: Request) -> JSONResponse:
        """The answer holds the image in base64. `prompt` is taken and has no effect: the picture alone decides."""
        refuse_query(request)
        service.refuse_early()
        with service.reader.hold() as reading:
            body = await reading.form(request)
            fields = parse(EditFields, body.fields)
            service.check_steps(fields.num_inference_steps, "num_inference_steps")
            ask = Ask(
                variant=service.variant(fields.model),
                seed=fields.seed,
                steps=fields.num_inference_steps,
                guidance=fields.guidance_scale,
                format=fields.output_format,
                quality=fields.output_compression,
            )
            picture = await service.translate(request, body.image, ask)
        answer = EditAnswer(
            created=int(time.time()),
            data=[EditedImage(b64_json=base64.b64encode(picture.data).decode("ascii"))],
            output_format=picture.format,
            size=f"{picture.width}x{picture.height}",
            seed=picture.seed,
        )
        return JSONResponse(answer.model_dump(), headers=answer_headers(picture))

    @routes.get("/v1/models", summary="What is served", responses=error_responses(*OF_EVERY_ROUTE))
    async def models() -> ModelList:
        return ModelList(data=[ModelCard(id=name, created=started) for name in service.models])

    @routes.get("/v1/models/{model}", summary="One of them", responses=error_responses("model_not_found", *OF_EVERY_ROUTE))
    async def model(model: str) -> ModelCard:
        service.variant(model)
        return ModelCard(id=model, created=started)

    return routes


def refuse_query(request: Request) -> None:
    """ApiError for a query, where all is said in the body."""
    for name in request.query_params:
        raise ApiError("unknown_field", f"there is no query parameter {name} here; send it in the form", param=name)
