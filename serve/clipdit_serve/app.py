"""The FastAPI application, from an engine, settings and a decoder that are handed in."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from clipdit_serve import errors
from clipdit_serve.decoding import Decoder
from clipdit_serve.engine import Engine
from clipdit_serve.guards import HEALTH, METRICS, Authorisation, OneLength, Ports, Record
from clipdit_serve.jobs import Jobs
from clipdit_serve.metrics import Metrics
from clipdit_serve.reloading import Reloads
from clipdit_serve.routes import jobs, openai, operations, page, translate
from clipdit_serve.service import Service
from clipdit_serve.settings import ServeSettings
from clipdit_serve.tracing import Traces
from clipdit_serve.variants import Variants

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)


def create_app(
    engine: Engine | Variants,
    decoder: Decoder,
    settings: ServeSettings,
    *,
    metrics_port: int | None = None,
    tracer_provider: "TracerProvider | None" = None,
) -> FastAPI:
    """The application. Its lifespan starts and closes the engines and the decoder; its jobs, or None where there are none, are in
    `app.state.jobs`, its metrics in `app.state.metrics`, and `app.state.reloads` reloads the engines.

    Args:
        metrics_port: /metrics is answered to whoever comes through this port, without a key, and nowhere else.
        tracer_provider: where traces go; see tracing.py. Whoever made it shuts it down.

    It has no pages that load scripts from elsewhere (/docs, /redoc), no CORS headers, and fetches no addresses.
    """
    engines = Variants.of(engine)
    metrics = Metrics(engines)
    traces = Traces(tracer_provider)
    service = Service(engines, decoder, settings, traces)
    reloads = Reloads(engines, on_end=metrics.reload)
    kept = Jobs(service, on_end=metrics.job) if settings.max_jobs else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engines.start(metrics.batch)
        starting = asyncio.create_task(decoder.start())
        starting.add_done_callback(_say_why_not)
        try:
            yield
        finally:
            if kept is not None:
                await kept.close()
            await reloads.close()
            engines.close()
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await asyncio.to_thread(decoder.close)

    app = FastAPI(
        title="clipdit",
        version=version("clipdit"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        **_telemetry(tracer_provider),
    )
    app.state.jobs, app.state.metrics, app.state.reloads = kept, metrics, reloads
    app.include_router(page.router(engines))
    app.include_router(translate.router(service))
    app.include_router(openai.router(service))
    if kept is not None:
        app.include_router(jobs.router(service, kept))
    app.include_router(operations.router(service, metrics, reloads, described=metrics_port is None))
    errors.install(app)

    if metrics_port is not None:
        app.add_middleware(Ports, metrics_port=metrics_port)
    if settings.api_key is not None:
        app.add_middleware(Authorisation, key=settings.api_key, metrics_port=metrics_port)
    app.add_middleware(OneLength)
    app.add_middleware(Record, metrics=metrics, traces=traces)  # the last one added is the outermost
    return app


def _telemetry(provider: "TracerProvider | None") -> dict[str, Any]:
    """FastAPI's own tracing of requests: those of whoever watches the service left out, and none of its metrics and logs, which
    would be told twice."""
    if provider is None:
        return {}
    chosen = {"tracer_provider": provider, "metrics": False, "logs": False, "operation_spans": False, "auto_configure": False}
    return {"telemetry": chosen | {"exclude": lambda scope: scope["path"] in HEALTH | {METRICS}}}


def _say_why_not(starting: asyncio.Task) -> None:
    if not starting.cancelled() and (error := starting.exception()) is not None:
        logger.critical("the decoding processes cannot be started; the service stays unready: %s", error, exc_info=error)
