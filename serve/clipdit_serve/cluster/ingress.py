"""A replica that answers HTTP: the application of app.py, whose engine asks model replicas."""

import os
from dataclasses import dataclass

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from clipdit_serve.app import create_app
from clipdit_serve.cluster.engine import ANSWERS_WITHIN_S, RayEngine
from clipdit_serve.cluster.merging import merged
from clipdit_serve.cluster.sizes import Sizes
from clipdit_serve.decoding import DecodePool
from clipdit_serve.heap import limit_heaps
from clipdit_serve.logs import log_to_stderr, log_trace_ids
from clipdit_serve.metrics import Metrics
from clipdit_serve.settings import ServeSettings
from clipdit_serve.tracing import close_provider, open_provider

NAME, NAME_OF_INGRESSES = "clipdit", "Ingress"
"""Of the application, and of this deployment in it."""


@dataclass(frozen=True, kw_only=True)
class Left:
    """What an ingress has to do before it may end."""

    idle: bool
    """Nobody who was admitted waits."""
    settled: bool
    """Every job's result was fetched."""


@serve.ingress()
class Ingress:
    """Args:
    models: the deployment of `ModelReplica`.
    json: log as JSON lines.
    """

    def __init__(self, models: DeploymentHandle, sizes: Sizes, settings: ServeSettings, *, json: bool):
        limit_heaps()
        log_to_stderr(json)
        self._sizes, self._settings = sizes, settings
        self._engine = RayEngine(models, sizes, settings)
        self._decoder = DecodePool(settings)
        self._tracer_provider = open_provider(os.environ)
        if self._tracer_provider is not None:
            log_trace_ids()

    def __serve_build_asgi_app__(self) -> FastAPI:
        self._application = create_app(self._engine, self._decoder, self._settings, tracer_provider=self._tracer_provider)
        if self._sizes.ingresses > 1:  # before the route of the same path, which knows of this ingress alone
            self._application.router.routes.insert(0, Route("/metrics", self._metrics_of_all))
        return self._application

    async def exposition(self) -> tuple[str, str]:
        """(this replica's name, its metrics)."""
        metrics: Metrics = self._application.state.metrics
        return serve.get_replica_context().replica_id.unique_id, metrics.exposition()[0].decode()

    async def _metrics_of_all(self, request: Request) -> Response:
        all_of_us = serve.get_deployment_handle(NAME_OF_INGRESSES, app_name=NAME)
        answers = await all_of_us.broadcast("exposition").results_async(timeout_s=ANSWERS_WITHIN_S, return_exceptions=True)
        text, content_type = merged(dict([answer for answer in answers if isinstance(answer, tuple)]))
        return Response(text, headers={"content-type": content_type})

    async def reload(self) -> None:
        """Ask for it, of all models: one ingress is enough."""
        self._application.state.reloads.ask()

    async def ready(self) -> bool:
        """Whether the next request is answered."""
        return self._engine.health().state == "ready" and self._decoder.ready

    def __del__(self) -> None:
        """Called by Ray at its end."""
        if (provider := getattr(self, "_tracer_provider", None)) is not None:
            close_provider(provider)

    async def drain(self) -> Left:
        """Admit nobody from now on."""
        self._engine.drain()
        jobs = self._application.state.jobs
        return Left(idle=self._engine.idle, settled=jobs is None or jobs.settled)
