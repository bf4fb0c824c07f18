"""A Ray to run on: the cluster that RAY_ADDRESS names, or one of our own that ends with this process."""

import ipaddress
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from clipdit_serve import own_ray

logger = logging.getLogger(__name__)

MIN_CPUS = 4
"""Ray plans with whole CPUs. With two, a pipeline of readers, a model and writers can wait for itself for ever; so our own Ray is
told of at least four, which are shares of what is there."""

T = TypeVar("T")


class Cluster:
    """Connected until `close`.

    Args:
        cpus: what a Ray of our own has at least, as it counts.
    """

    def __init__(self, cpus: int):
        _before_ray_is_imported()
        import ray

        address = os.environ.get("RAY_ADDRESS")
        self.own = address is None
        self._folder: str | None = None
        if address is not None:
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ValueError(f"RAY_ADDRESS is {address}, where no Ray answers: {error}") from error
        else:
            cpus = max(MIN_CPUS, os.cpu_count() or 1, cpus)
            try:
                self._folder = own_ray.start(cpus, log_to_driver=False)
            except Exception as error:  # a plain Exception, where the machine is too busy for it to start in time
                raise ValueError(f"Ray could not be started: {' '.join(str(error).split())[:300]}") from error
            host = ray.util.get_node_ip_address()
            if not ipaddress.ip_address(host).is_loopback:
                logger.warning(
                    "Ray listens on %s, because it was imported before; whoever reaches it can run programs here", host
                )
        self._servers = own_ray.servers() if self.own else []
        resources = ray.cluster_resources()
        self.cpus, self.gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        logger.info("%s, %d CPUs, %d GPUs", "a Ray of our own" if self.own else f"Ray at {address}", self.cpus, self.gpus)

    def lost(self) -> str | None:
        """Which process of our own Ray died, if one did. Ask often, as `own_ray.lost` says."""
        server = own_ray.lost(self._servers)
        return None if server is None else f"Ray's process {server.pid} was killed"

    def trouble(self) -> str | None:
        """Why it cannot go on, if so."""
        import ray

        if (lost := self.lost()) is not None:
            return lost
        try:
            nodes = within(10.0, ray.nodes)
        except Exception as error:  # any error of its client says the same
            return f"Ray does not answer ({' '.join(str(error).split())[:200] or type(error).__name__})"
        return None if any(node["Alive"] for node in nodes) else "Ray's last node died"

    def close(self) -> None:
        """End our own Ray, or leave the cluster. Returns although Ray should hang."""
        import ray

        try:
            within(30.0, ray.shutdown)
        except Exception as error:  # whatever it was, its folder goes, and the job has its result
            logger.warning("Ray did not end by itself: %s", error)
        if self._folder is not None:
            own_ray.remove(self._folder)


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of a call that may hang. TimeoutError when it does; its thread is then left to itself."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # the caller raises it: it must not be lost with this thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def _before_ray_is_imported() -> None:
    """Ray and the processes it starts read these; whoever has set them, or imported Ray before, keeps the last word."""
    if "ray" in sys.modules:
        return
    # its errors that matter become ours; others are advice to developers
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # tasks without a GPU keep CUDA_VISIBLE_DEVICES: a warning less
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if "RAY_ADDRESS" in os.environ:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    else:
        own_ray.prepare()
