"""For whoever runs the service: is it alive, is it ready, how is it."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from clipdit_serve.guards import METRICS
from clipdit_serve.metrics import Metrics
from clipdit_serve.reloading import Reloads
from clipdit_serve.routes.documentation import OF_EVERY_ROUTE, error_responses
from clipdit_serve.service import Service


def router(service: Service, metrics: Metrics, reloads: Reloads, *, described: bool = True) -> APIRouter:
    """described: whether /metrics is in the OpenAPI document."""
    routes = APIRouter(tags=["operations"])

    @routes.get("/livez", summary="Does the process answer, and can it ever be ready again?", responses={503: {}})
    async def livez() -> JSONResponse:
        """503 when only a restart helps: also when one of several variants died."""
        dead = service.engines.dead
        return JSONResponse({"status": "dead" if dead else "alive"}, 503 if dead else 200)

    async def readyz(request: Request) -> JSONResponse:
        """Is the next request answered? 503 while loading, draining, full, or when the model died or hangs. Of several variants
        it is the default one; loading as long as one of them is. With `?verbose`: how it is."""
        health = service.engines.health()
        status, said = health.state, health.said
        if status == "ready" and not service.decoder.ready:
            status, said = "loading", "the decoding processes are being started; come again in a few seconds"
        elif status == "ready" and health.waiting >= service.settings.queue:
            status, said = "full", "as many requests wait as may"
        body: dict = {"status": status}
        if "verbose" in request.query_params:
            body |= {"said": said, **_details(service, service.engines.default)}
            if service.engines.several:
                body["variants"] = {name: _details(service, name) for name in service.engines}
            body["reload"] = _reload(reloads)
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
        text, content_type = metrics.exposition()
        return Response(text, headers={"content-type": content_type})

    return routes


def _details(service: Service, variant: str) -> dict:
    """Of one engine, for people who look closer."""
    engine = service.engines[variant]
    health, model = engine.health(), engine.model
    told: dict = {"state": health.state, "waiting": health.waiting, "running": health.running, **health.details}
    if model is not None:
        id = service.model_id(variant, model.fingerprint)
        told |= {"model": id, "backend": model.backend, "precision": model.precision}
    return told


def _reload(reloads: Reloads) -> dict | None:
    """The last one; null before the first. Why it was refused is in the log: it names folders, and this route is open."""
    last = reloads.last
    told = None if last is None else {"result": last.result, "at": int(last.at_s)}
    return {"result": "under way"} if reloads.under_way else told
