"""A Ray of this process's own, closed to everybody else.

Whoever reaches Ray's ports can run programs, so it listens at 127.0.0.1 alone, asks for a token that nobody else has, and has no
dashboard. It is always a new one: a Ray that a killed process left behind, or that somebody else runs on this machine, is not
touched.
"""

import logging
import os
import secrets
import shutil
import sys
import tempfile
from typing import Any

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
