"""From the first request to the last one after SIGTERM, as server.py does it in one process.

SIGTERM   every ingress says 503 at /readyz and refuses new translations at once, while the port stays open; when everybody who
          was admitted has his answer, every job's result was fetched and `linger_s` is over, replicas and cluster end.
SIGINT    the same without lingering, and without waiting for results to be fetched; a second one does not wait for anybody.
SIGHUP    every model is opened anew, and replaced when it is warm; SIGTERM, if the terminal is gone.
"""

import logging
import signal
import time
from collections.abc import Callable
from types import FrameType

from ray import serve
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from clipdit_serve.cluster.ingress import NAME
from clipdit_serve.cluster.ports import address_of
from clipdit_serve.server import has_terminal

logger = logging.getLogger(__name__)

TICK_S = 0.1


class Stopped(BaseException):
    """A signal came before the service was ready, or a second one."""


class Runner:
    """Runs an application on the cluster that this process is connected to.

    Args:
        on_ready: called once, with the address, when the first request would be answered.
    """

    def __init__(self, *, host: str, port: int, linger_s: float, drain_s: float, on_ready: Callable[[str], None]):
        self._host, self._port = host, port
        self._linger_s, self._drain_s, self._on_ready = linger_s, drain_s, on_ready
        self.signal: int | None = None
        """The one that ended it."""
        self._signalled_s = 0.0
        self._up = self._reload = False
        self._had_terminal = has_terminal()

    def run(self, application: Application) -> None:
        """Returns when it has ended. RuntimeError for replicas that do not start."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._on_hang_up)
        try:
            self._serve(application)
        except Stopped:
            pass
        finally:
            self._up = True  # from here on signals only count
            serve.shutdown()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._signalled_s = number, time.monotonic()
            if self._up:
                return
        raise Stopped

    def _on_hang_up(self, number: int, frame: FrameType | None) -> None:
        if self._had_terminal and not has_terminal():
            self._on_signal(signal.SIGTERM, frame)
        else:
            self._reload = True

    def _serve(self, application: Application) -> None:
        serve.start(
            proxy_location="EveryNode",
            http_options={"host": self._host, "port": self._port},
            logging_config=LoggingConfig(log_level="ERROR", enable_access_log=False),
        )
        try:
            ingress = serve.run(application, name=NAME, route_prefix="/")
        except RuntimeError as error:
            deployments = serve.status().applications[NAME].deployments.values()
            raise RuntimeError("\n".join([str(error), *(deployment.message for deployment in deployments)])) from error
        while not all(self._all(ingress, "ready") or [False]):
            time.sleep(TICK_S)
        self._up = True
        self._on_ready(address_of(self._host, self._port))
        while self.signal is None:
            time.sleep(TICK_S)
            if self._reload:
                self._reload = False
                ingress.reload.remote()
        self._drain(ingress)

    def _drain(self, ingress: DeploymentHandle) -> None:
        while (for_s := time.monotonic() - self._signalled_s) < self._drain_s:
            left = self._all(ingress, "drain")  # again and again: one that Ray has just started would not know
            lingered = for_s >= self._linger_s and all(one.settled for one in left)
            if all(one.idle for one in left) and (lingered or self.signal == signal.SIGINT):
                return
            time.sleep(TICK_S)

    @staticmethod
    def _all(ingress: DeploymentHandle, method: str) -> list:
        """What each ingress answers, of those that do."""
        try:
            answers = ingress.broadcast(method).results(timeout_s=5, return_exceptions=True)
        except (TimeoutError, RayServeException):
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]
