"""A Ray cluster of this machine alone, closed to everybody else; or one that runs already."""

import json as json_module
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from clipdit_serve import own_ray
from clipdit_serve.cluster import border

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "0",  # it would listen at every address, past border.py, and end after half a minute
    # Routing and our code in one thread, which waits and never computes: hand-overs between threads cost milliseconds.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_worker_niceness": "0",  # callers wait for them; 15 is for work that steps back for everybody else's
    "AUTOSCALER_METRIC_PORT": "0",  # any: two services on one machine are none of each other's business
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # 5 are too few on a machine that starts everything at the same time
    border.VARIABLE: border.IMPORT_PATH,
}
"""Of Ray's processes, not of this one: it has no event loop, and needs its router in another thread."""


@contextmanager
def cluster(*, address: str | None, cpus: int, json: bool, without: str) -> Iterator[None]:
    """A Ray cluster around the block.

    One that is started is closed to everybody else (`own_ray`); it ends with the block, and its files go. When it dies before,
    this process ends.

    Args:
        address: of a cluster that runs already; None starts one.
        cpus: as Ray counts them, of one that is started.
        json: its log lines are JSON.
        without: an environment variable that its processes must not have.
    """
    folder = watch = None
    if address is None:
        own_ray.prepare()
    import ray
    import ray.serve
    from ray._private import worker as ray_worker
    from ray._private.ray_logging import global_worker_stdstream_dispatcher

    printer, hidden = Printer(json), os.environ.pop(without, None)
    os.environ |= ENVIRONMENT
    try:
        if address is None:
            folder = own_ray.start(cpus, namespace="clipdit", log_to_driver=True)
            watch = own_ray.Watch(folder)
        else:
            ray.init(address=address, namespace="clipdit", logging_level=logging.ERROR, log_to_driver=True)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        ray_worker._worker_logs_enabled = False  # it would print to the output that belongs to the one line with the address
        global_worker_stdstream_dispatcher.add_handler("clipdit", printer)
        yield
    finally:
        if watch is not None:
            watch.close()
        ray.shutdown()
        if hidden is not None:
            os.environ[without] = hidden
        global_worker_stdstream_dispatcher.remove_handler("clipdit")
        printer.close()
        ray_worker._worker_logs_enabled = True
        if folder is not None:
            own_ray.remove(folder)


CONTROLLER = "SERVE_CONTROLLER_ACTOR"
"""Of Ray Serve. What it says of a replica that ended the replica has said; the autoscaler says that it has nothing to do."""


class Printer:
    """Lines of the cluster's processes, as they are; in JSON, those that are none become some.

    Ray reads a line that is being written in two pieces (its log monitor takes what there is). Of JSON they are put together."""

    def __init__(self, json: bool):
        self._json = json
        self._begun: dict[tuple, str] = {}  # first pieces, by where they come from

    def __call__(self, data: dict) -> None:
        """What Ray tells of lines that a process wrote."""
        if data["pid"] == "autoscaler" or data.get("actor_name") == CONTROLLER:
            return
        for line in data["lines"]:
            if self._json:
                self._json_line(line, data["pid"], data["is_err"], (data.get("ip"), data["pid"], data["is_err"]))
            else:
                _say(line)

    def close(self) -> None:
        """The second pieces will not come any more."""
        for (_, pid, is_err), begun in self._begun.items():
            _say(_as_json(begun, pid, is_err))
        self._begun.clear()

    def _json_line(self, line: str, pid: int | str, is_err: bool, source: tuple) -> None:
        begun = self._begun.pop(source, None)
        if begun is not None:
            if _is_json(begun + line):
                _say(begun + line)
                return
            _say(_as_json(begun, pid, is_err))
        if _is_json(line):
            _say(line)
        elif line.startswith("{"):
            self._begun[source] = line
        else:
            _say(_as_json(line, pid, is_err))


def _is_json(line: str) -> bool:
    try:
        return isinstance(json_module.loads(line), dict)
    except ValueError:
        return False


def _as_json(line: str, pid: int | str, is_err: bool) -> str:
    return json_module.dumps({"level": "WARNING" if is_err else "INFO", "logger": "ray", "message": line, "pid": pid})


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
