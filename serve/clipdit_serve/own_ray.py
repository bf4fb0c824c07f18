"""A Ray of this process's own, closed to everybody else.

Whoever reaches Ray's ports can run programs, so it listens at 127.0.0.1 alone, asks for a token that nobody else has, and has no
dashboard. It is always a new one: a Ray that a killed process left behind, or that somebody else runs on this machine, is not
touched.
"""

import contextlib
import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
from typing import Any

import psutil

logger = logging.getLogger(__name__)

SERVERS = ("raylet", "gcs_server")
"""What holds it together. They are children of the process that started it; workers are the raylet's."""

LOOK_S = 0.5
"""From one look at them to the next."""

FAULT = 1
"""Exit code, as clipdit.cli has it."""

CLOSED = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray takes 127.0.0.1 for "this machine" and listens where other machines reach it, unless it may have no cluster at all, as
    # on macOS. The name of the variable is Ray's.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


def prepare() -> None:
    """Have Ray and the processes it starts ask for a token, whatever is set for another one. Ray reads that when it is imported:
    later this does nothing."""
    if "ray" not in sys.modules:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def start(cpus: int, **options: Any) -> str:
    """Start it; it ends with `ray.shutdown`. Whoever calls has called `prepare` before Ray was imported.

    Args:
        cpus: as Ray counts them.
        options: more of `ray.init`.

    Returns:
        The folder of its sockets and logs, for `remove` after its end.

    Raises:
        Exception: of many kinds, plain `Exception` among them, where it did not start.
    """
    import ray
    from ray._private import ray_constants

    os.environ |= CLOSED
    ray_constants.ENABLE_RAY_CLUSTER = False  # also where Ray was imported before it could read that
    folder = tempfile.mkdtemp(prefix="clipdit-ray-")  # short: paths of sockets are
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
            **options,
        )
    except BaseException:  # an interrupt, too: the folder is ours to remove
        remove(folder)
        raise
    return folder


def remove(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def servers() -> list[psutil.Process]:
    """Those of the Ray that this process has just started."""
    return [process for process in psutil.Process().children() if process.name() in SERVERS]


def lost(servers: list[psutil.Process]) -> psutil.Process | None:
    """One that died. Ask often: as soon as Ray in this process needs a dead raylet, it ends this process without a word."""
    for server in servers:
        try:
            if server.status() == psutil.STATUS_ZOMBIE:
                return server
        except psutil.NoSuchProcess:
            return server
    return None


class Watch:
    """Ends this process, and whatever Ray started for it, when one of Ray's servers dies. Without a raylet callers would wait for
    ever for answers, and readiness goes on being told for a quarter of a minute; whoever supervises this process starts it again.

    Args:
        folder: of `start`; removed with the process.
    """

    def __init__(self, folder: str):
        self._folder, self._servers, self._over = folder, servers(), threading.Event()
        self._names = {server.pid: server.name() for server in self._servers}
        self._family: list[psutil.Process] = []
        threading.Thread(target=self._run, daemon=True, name="ray-watch").start()

    def close(self) -> None:
        """Ray may end now."""
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(LOOK_S):
            family = psutil.Process().children(recursive=True)
            if (server := lost(self._servers)) is not None:
                self._end(server)
            self._family = family  # from before the raylet died: its workers are nobody's children afterwards

    def _end(self, server: psutil.Process) -> None:
        if self._over.is_set():
            return
        logger.error(
            "Ray's %s (process %d) died, and the service ends with it: start it again", self._names[server.pid], server.pid
        )
        for process in self._family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        remove(self._folder)
        logging.shutdown()
        os._exit(FAULT)
