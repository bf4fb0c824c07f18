"""A Ray cluster of this machine alone, closed to everybody else; or one that runs already."""

import json as json_module
import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from clipdit_serve.cluster import border

logger = logging.getLogger(__name__)

NOISE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",  # it would take every address of the machine, and half a minute to end
    "RAY_DEDUP_LOGS": "0",  # a line that is like another is still a line of the log
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    border.VARIABLE: border.IMPORT_PATH,
}


@contextmanager
def cluster(*, address: str | None, cpus: int, json: bool, without: str) -> Iterator[None]:
    """A Ray cluster around the block.

    One that is started listens at this machine's own address, has no dashboard, and answers only who knows a token that nobody
    else has; it ends with the block, and its files go.

    Args:
        address: of a cluster that runs already; None starts one.
        cpus: as Ray counts them, of one that is started.
        json: its log lines are JSON.
        without: an environment variable that its processes must not have.
    """
    hidden = os.environ.pop(without, None)
    os.environ.update(NOISE)
    folder = None
    if address is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        folder = tempfile.mkdtemp(prefix="clipdit-ray-")  # short: paths of sockets are
    import ray
    from ray._private.ray_logging import global_worker_stdstream_dispatcher

    started = {
        "num_cpus": cpus,
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": folder,
    }
    try:
        ray.init(
            address="local" if address is None else address,
            namespace="clipdit",
            logging_level=logging.ERROR,
            log_to_driver=True,
            **(started if address is None else {}),
        )
        if hidden is not None:
            os.environ[without] = hidden
        global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
        global_worker_stdstream_dispatcher.add_handler("clipdit", lambda data: _print(data, json))
        yield
    finally:
        ray.shutdown()
        global_worker_stdstream_dispatcher.remove_handler("clipdit")
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _print(data: dict, json: bool) -> None:
    """Lines of the cluster's processes, as they are; in JSON, those that are none become some."""
    for line in data["lines"]:
        if json and not line.startswith("{"):
            record = {"level": "WARNING" if data["is_err"] else "INFO", "logger": "ray", "message": line, "pid": data["pid"]}
            line = json_module.dumps(record)
        print(line, file=sys.stderr, flush=True)
