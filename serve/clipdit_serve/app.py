"""The FastAPI application, from an engine, settings and a decoder that are handed in."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from clipdit_serve import errors
from clipdit_serve.decoding import Decoder
from clipdit_serve.engine import Engine
from clipdit_serve.guards import Authorisation, Record
from clipdit_serve.jobs import Jobs
from clipdit_serve.metrics import Metrics
from clipdit_serve.routes import jobs, openai, operations, page, translate
from clipdit_serve.service import Service
from clipdit_serve.settings import ServeSettings

logger = logging.getLogger(__name__)


def create_app(engine: Engine, decoder: Decoder, settings: ServeSettings) -> FastAPI:
    """The application. Its lifespan starts and closes the engine and the decoder; its jobs, or None where there are none, are in
    `app.state.jobs`, its metrics in `app.state.metrics`.

    It has no pages that load scripts from elsewhere (/docs, /redoc), no CORS headers, and fetches no addresses.
    """
    metrics = Metrics(waiting=lambda: engine.health().waiting)
    service = Service(engine, decoder, settings)
    kept = Jobs(service, on_end=metrics.job) if settings.max_jobs else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start(metrics.batch)
        starting = asyncio.create_task(decoder.start())
        starting.add_done_callback(_say_why_not)
        try:
            yield
        finally:
            if kept is not None:
                await kept.close()
            engine.close()
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await asyncio.to_thread(decoder.close)

    app = FastAPI(
        title="clipdit", version=version("clipdit"), lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.jobs, app.state.metrics = kept, metrics
    app.include_router(page.router())
    app.include_router(translate.router(service))
    app.include_router(openai.router(service))
    if kept is not None:
        app.include_router(jobs.router(service, kept))
    app.include_router(operations.router(service, metrics))
    errors.install(app)

    if settings.api_key is not None:
        app.add_middleware(Authorisation, key=settings.api_key)
    app.add_middleware(Record, metrics=metrics)  # the last one added is the outermost
    return app


def _say_why_not(starting: asyncio.Task) -> None:
    if not starting.cancelled() and (error := starting.exception()) is not None:
        logger.critical("the decoding processes cannot be started; the service stays unready: %s", error, exc_info=error)
