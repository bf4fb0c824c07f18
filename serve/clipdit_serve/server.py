"""uvicorn, from the first request to the last one after SIGTERM.

SIGTERM   readyz says 503 and new translations are refused at once, while the port stays open: whoever balances load sees it
          before connections fail. When everybody who was admitted has his answer, every job's result was fetched, and
          `linger_s` is over, the port closes.
SIGINT    the same without lingering, and without waiting for results to be fetched; a second one, of either kind, does not wait
          for anybody.
SIGHUP    the model is opened anew and takes the place of the one that serves; see reloading.py. But when it comes because the
          terminal is gone that the service was started in, it is SIGTERM: nobody could end the service there any more.
"""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI

from clipdit_serve.connections import HEAD_BYTES, Connection
from clipdit_serve.decoding import Decoder
from clipdit_serve.engine import Engine
from clipdit_serve.jobs import Jobs
from clipdit_serve.reloading import Reloads
from clipdit_serve.variants import Variants

logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Serves an application of `create_app`.

    Args:
        engine: the application's, or all of them; drained at a signal.
        decoder: the application's.
        sockets: bound, one or two; the second is where the application's /metrics is answered.
        linger_s: from SIGTERM to the port's end, at least, seconds.
        drain_s: likewise at most; who has no answer by then gets none.
        on_ready: called once, with the address, when the first request would be answered.
    """

    def __init__(
        self,
        app: FastAPI,
        engine: Engine | Variants,
        decoder: Decoder,
        *,
        sockets: Sequence[socket.socket],
        linger_s: float,
        drain_s: float,
        on_ready: Callable[[str], None],
    ):
        super().__init__(
            uvicorn.Config(
                app,
                access_log=False,  # guards.Record writes one
                log_config=None,
                server_header=False,
                http=Connection,
                h11_max_incomplete_event_size=HEAD_BYTES,
                reset_contextvars=True,  # or a request that was sent behind another counts as a part of it in traces
                proxy_headers=False,  # would believe anybody who says he is a proxy
                ws="none",
                lifespan="on",
                timeout_graceful_shutdown=5,  # by then nobody waits but those whose answer is being sent
            )
        )
        self._engines, self._decoder, self._on_ready = Variants.of(engine), decoder, on_ready
        self._jobs: Jobs | None = app.state.jobs
        self._reloads: Reloads = app.state.reloads
        self._had_terminal = has_terminal()
        self._linger_s, self._drain_s = linger_s, drain_s
        self._sockets = list(sockets)
        self._announced = False
        self.signal: int | None = None
        """The one that ended it."""
        self._signalled_s = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by Python between two instructions of the main thread."""
        if self.signal is not None:
            self.should_exit = self.force_exit = True
            return
        self.signal, self._signalled_s = sig, time.monotonic()
        self._engines.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(self._sockets if sockets is None else sockets)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hang_up)

    def _hang_up(self) -> None:
        if self._had_terminal and not has_terminal():
            self.handle_exit(signal.SIGTERM, None)
        else:
            self._reloads.ask()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if not self._announced and self._engines.dead:
            return True  # it could not be loaded: whoever called us says why
        if not self._announced and self._engines.health().state == "ready" and self._decoder.ready:
            self._announced = True
            self._on_ready(self.address)
        if self.signal is not None:
            for_s = time.monotonic() - self._signalled_s
            left = for_s >= self._linger_s and (self._jobs is None or self._jobs.settled)
            if (self._engines.idle and (left or self.signal == signal.SIGINT)) or for_s >= self._drain_s:
                return True
        return await super().on_tick(counter)

    @property
    def address(self) -> str:
        """http://HOST:PORT, with the port that was taken where 0 was asked for."""
        return f"http://{join_host(*self.servers[0].sockets[0].getsockname()[:2])}"


def has_terminal() -> bool:
    """Whether this process belongs to one that is there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def bind(host: str, port: int, option: str = "--port") -> socket.socket:
    """A socket that listens there. ValueError where it cannot be had; `option` is where the port comes from."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"cannot listen at {join_host(host, port)}: {error}. Choose another {option}") from error


def join_host(host: str, port: int) -> str:
    """As addresses have them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
