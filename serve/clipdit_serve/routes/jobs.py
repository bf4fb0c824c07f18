"""/v1/jobs: an image in now, and an image out whenever the caller comes for it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, get_args

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import BaseModel, Field

from clipdit_serve.errors import ApiError
from clipdit_serve.fields import TranslateFields
from clipdit_serve.jobs import Event, Job, Jobs, Status, digest_of
from clipdit_serve.routes.documentation import (
    OF_EVERY_ROUTE,
    OF_TRANSLATION,
    ErrorBody,
    error_responses,
    form_body,
    image_bodies,
)
from clipdit_serve.routes.translate import OFFERED, early_variant, format_of, read_ask, refuse_repeats, respond
from clipdit_serve.service import Service
from clipdit_serve.uploads import choose_format

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        max_length=255,
        pattern=r"^[!-~]+$",
        description="The caller's name for this job, printable ASCII: asked for again, it is not made twice.",
    ),
]
LastEventId = Annotated[
    int | None, Header(alias="Last-Event-ID", ge=0, description="Of the last event that arrived; those after it are sent.")
]


PING_S = 10.0
"""Proxies close what is silent; most of them after 30 to 60 seconds."""


class JobAnswer(BaseModel):
    """A job, as it is."""

    id: str
    status: Status
    place: Annotated[int | None, Field(description="In the queue, in order of arrival; 1 is the oldest.")]
    seed: int
    created: Annotated[int, Field(description="Seconds since 1970.")]
    expires: Annotated[int | None, Field(description="When it is forgotten, seconds since 1970; null before it is finished.")]
    result: Annotated[str | None, Field(description="The path of the image; null before it is there.")]
    error: Annotated[ErrorBody | None, Field(description="Why it failed.")]


EVENT = {
    "type": "object",
    "required": ["id", "event", "data"],
    "properties": {
        "id": {"type": "string"},
        "event": {"enum": list(get_args(Status))},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/JobAnswer"},
        },
    },
}
"""Of one server-sent event, as OpenAPI 3.2 describes it."""


def router(service: Service, jobs: Jobs) -> APIRouter:
    routes = APIRouter(prefix="/v1/jobs", tags=["jobs"])
    of_a_job = error_responses("job_not_found", *OF_EVERY_ROUTE)

    @routes.post(
        "",
        summary="Translate an image, and come for it later",
        status_code=202,
        response_model=JobAnswer,
        responses=error_responses(*OF_TRANSLATION, "idempotency_key_reused", "too_many_jobs")
        | {202: {"description": "The job; `Location` is its path", "headers": {"Location": {"schema": {"type": "string"}}}}},
        openapi_extra={
            "requestBody": {"required": True, "content": image_bodies() | {"multipart/form-data": form_body(TranslateFields)}}
        },
    )
    async def create(
        request: Request, query: Annotated[TranslateFields, Query()], idempotency_key: IdempotencyKey = None
    ) -> JSONResponse:
        """The image and its fields are sent as to /v1/translate. What is wrong with them is said at once. The same
        `Idempotency-Key` with the same content is answered with the job that is there already."""
        refuse_repeats(request)
        if not jobs.knows(idempotency_key):  # else the job was accepted, whether or not another one would be now
            service.refuse_early(early_variant(service, request, query))
            jobs.check_room()
        with service.reader.hold() as reading:
            image, ask = await read_ask(service, reading, request, query)
            digest = "" if idempotency_key is None else await asyncio.to_thread(digest_of, image, ask)
            job = jobs.find(idempotency_key, digest)
            if job is None:
                job = await service.attended(request, jobs.accept(image, ask, key=idempotency_key, digest=digest))
        return _described(job, status_code=202, headers={"Location": f"/v1/jobs/{job.id}"})

    @routes.get("/{id}", summary="How a job is", response_model=JobAnswer, responses=of_a_job)
    async def read(id: str) -> JSONResponse:
        return _described(jobs.get(id))

    @routes.get(
        "/{id}/result",
        summary="The image of a job that is done",
        response_class=Response,
        responses=error_responses(
            *OF_EVERY_ROUTE,
            "job_not_found",
            "not_acceptable",
            "job_not_done",
            *("invalid_value", "model_error", "draining", "model_unavailable", "deadline_exceeded"),  # why it failed
        )
        | {200: {"content": {type: {} for type in OFFERED}, "description": "The image"}},
    )
    async def result(id: str, request: Request) -> Response:
        """`Accept` chooses the format, as for /v1/translate. Of a job that failed: its error."""
        job = jobs.get(id)
        media_type = choose_format(request.headers.get("accept"), OFFERED)
        if job.error is not None:
            job.collected = True
            return job.error.response()
        if job.translated is None:
            wait = "it was cancelled" if job.finished else "wait for it, or follow its events"
            raise ApiError("job_not_done", f"the job is {job.status}; {wait}")
        picture = await service.encode(job.translated, format_of(media_type), job.ask.quality)
        job.collected = True
        return respond(picture, media_type)

    @routes.get(
        "/{id}/events",
        summary="Follow a job",
        response_class=Response,  # of a route with EventSourceResponse FastAPI wants a generator, which could not answer 204
        responses=error_responses(*OF_EVERY_ROUTE, "job_not_found", "invalid_value")
        | {
            200: {"content": {EventSourceResponse.media_type: {"itemSchema": EVENT}}, "description": "The events"},
            204: {"description": "The last event was sent already"},
        },
    )
    async def events(id: str, last_event_id: LastEventId = None) -> Response:
        """Server-sent events `queued`, `running` and `done`, `failed` or `cancelled`, each with the job as its data; the stream
        ends after the last one. 204, which keeps browsers from coming back, when that one was sent already."""
        job = jobs.get(id)
        after = min(last_event_id or 0, len(job.events))
        if job.finished and after == len(job.events):
            return Response(status_code=204)
        # nginx would hold events back otherwise
        return EventSourceResponse(_encoded(job, after), headers={"cache-control": "no-cache", "x-accel-buffering": "no"})

    @routes.delete("/{id}", summary="Cancel a job, or forget a finished one", response_model=JobAnswer, responses=of_a_job)
    async def cancel(id: str) -> JSONResponse:
        """The job as it is then. A job that is cancelled can still be read; a finished one is gone."""
        job = jobs.get(id)
        await jobs.cancel(job)
        return _described(job)

    return routes


def _described(job: Job, *, status_code: int = 200, headers: dict[str, str] | None = None) -> JSONResponse:
    body = _as_of(job, Event(id=0, status=job.status, place=job.place))
    return JSONResponse(body.model_dump(), status_code, {"cache-control": "no-store"} | (headers or {}))


def _as_of(job: Job, event: Event) -> JobAnswer:
    """The job as it was then."""
    ended = event.status not in ("queued", "running")
    if event.status == "failed":  # whoever reads this knows that there is no result to wait for
        job.collected = True
    error = job.error if event.status == "failed" else None
    return JobAnswer(
        id=job.id,
        status=event.status,
        place=event.place,
        seed=job.seed,
        created=int(job.created_s),
        expires=int(job.expires_s) if ended and job.expires_s is not None else None,
        result=f"/v1/jobs/{job.id}/result" if event.status == "done" else None,
        error=None if error is None else ErrorBody.model_validate(error.body()),
    )


async def _encoded(job: Job, after: int) -> AsyncIterator[bytes]:
    async for event in job.follow(after, ping_s=PING_S):
        if event is None:
            yield KEEPALIVE_COMMENT
        else:
            yield format_sse_event(event=event.status, id=str(event.id), data_str=_as_of(job, event).model_dump_json())
