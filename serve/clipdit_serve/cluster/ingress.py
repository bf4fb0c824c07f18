"""A replica that answers HTTP: the application of app.py, whose engine asks model replicas."""

from dataclasses import dataclass

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from clipdit_serve.app import create_app
from clipdit_serve.cluster.engine import RayEngine
from clipdit_serve.cluster.sizes import Sizes
from clipdit_serve.decoding import DecodePool
from clipdit_serve.logs import log_to_stderr
from clipdit_serve.settings import ServeSettings


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
        log_to_stderr(json)
        self._settings = settings
        self._engine = RayEngine(models, sizes, settings)
        self._decoder = DecodePool(settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        self._application = create_app(self._engine, self._decoder, self._settings)
        return self._application

    async def ready(self) -> bool:
        """Whether the next request is answered."""
        return self._engine.health().state == "ready" and self._decoder.ready

    async def drain(self) -> Left:
        """Admit nobody from now on."""
        self._engine.drain()
        jobs = self._application.state.jobs
        return Left(idle=self._engine.idle, settled=jobs is None or jobs.settled)
