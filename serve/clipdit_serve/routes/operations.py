"""For whoever runs the service: is it alive, is it ready, how is it."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from clipdit_serve.guards import METRICS
from clipdit_serve.metrics import Metrics
from clipdit_serve.routes.documentation import OF_EVERY_ROUTE, error_responses
from clipdit_serve.service import Service


def router(service: Service, metrics: Metrics, *, described: bool = True) -> APIRouter:
    """described: whether /metrics is in the OpenAPI document."""
    routes = APIRouter(tags=["operations"])

    @routes.get("/livez", summary="Does the process answer, and can it ever be ready again?", responses={503: {}})
    async def livez() -> JSONResponse:
        """503 when only a restart helps."""
        state = service.engine.health().state
        return JSONResponse({"status": "dead" if state == "dead" else "alive"}, 503 if state == "dead" else 200)

    async def readyz(request: Request) -> JSONResponse:
        """Is the next request answered? 503 while loading, draining, full, or when the model died or hangs. With `?verbose`: how
        it is."""
        health = service.engine.health()
        status, said = health.state, health.said
        if status == "ready" and not service.decoder.ready:
            status, said = "loading", "the decoding processes are being started; come again in a few seconds"
        elif status == "ready" and health.waiting >= service.settings.queue:
            status, said = "full", "as many requests wait as may"
        body: dict = {"status": status}
        if "verbose" in request.query_params:
            model = service.engine.model
            body |= {"said": said, "waiting": health.waiting, "running": health.running, **health.details}
            if model is not None:
                body |= {"model": service.model_id(), "backend": model.backend, "precision": model.precision}
        return JSONResponse(body, 200 if status == "ready" else 503, {"Retry-After": "5"} if status != "ready" else None)

    for path in ("/readyz", "/health", "/healthz"):
        routes.get(path, summary="Is the next request answered?", responses={503: {}}, operation_id=path[1:])(readyz)

    @routes.get(
        METRICS,
        summary="Prometheus metrics",
        response_class=Response,
        responses=error_responses(*OF_EVERY_ROUTE),
        include_in_schema=described,
    )
    async def read_metrics() -> Response:
        if service.engine.model is not None:
            metrics.model(service.engine.model)
        text, content_type = metrics.exposition()
        return Response(text, headers={"content-type": content_type})

    return routes
