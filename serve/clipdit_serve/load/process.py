"""A service of our own to ask, in a process of its own: what asks must not take turns with what answers."""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

STOPS_WITHIN_S = 10.0
"""After a load test nobody waits for answers any more."""


@contextlib.contextmanager
def running(options: Sequence[str]) -> Iterator[str]:
    """The address of a `clipdit serve` with these options, at a free port; it is ready, and ends with the block, also when
    SIGTERM ends us. Call it from the main thread.

    ValueError, with what it said last, when it does not start."""
    start = "from clipdit.cli import script; script()"
    command = [sys.executable, "-P", "-c", start, "serve", "--port", "0", "--linger-s", "0", "--json", *options]
    with tempfile.TemporaryFile("w+") as log:  # a pipe that nobody reads would block it
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        # by default SIGTERM ends a Python without another word, and the service would go on alone
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            line = process.stdout.readline()
            if not line:
                process.wait(STOPS_WITHIN_S)
                log.seek(0)
                said = (log.read().strip().splitlines() or ["it said nothing"])[-1].removeprefix("clipdit: ")
                raise ValueError(f"the service does not start: {said}")
            yield json.loads(line)["url"]
        finally:
            signal.signal(signal.SIGTERM, before)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOPS_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
