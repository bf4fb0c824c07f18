"""Jobs on Ray in a process of their own, so that it, its workers and its raylet can be killed."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

SCRIPT = """
import logging, sys
from pathlib import Path
from clipdit.fake_backend import FakeBackend
from clipdit.offline import run_job
from clipdit.translator import Translator
from clipdit_serve.offline.engine import RayEngine
logging.basicConfig(level=logging.INFO)
source, output, delay_s = sys.argv[1:]

def open_translator():
    return Translator(FakeBackend(native_size=(32, 32), delay_s=float(delay_s)))

if __name__ == "__main__":
    engine = RayEngine(open_translator)
    try:
        summary = run_job(engine, Path(source), Path(output), resume=True)
    except ValueError as error:
        sys.exit(f"clipdit: {error}")
    finally:
        engine.close()
    print(summary)
"""


def start_ray_job(source: Path, output: Path, delay_s: float = 0.0, *, log: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    with log.open("a") as stream:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(source), str(output), str(delay_s)], env=environment, stdout=stream, stderr=stream
        )


def lines(output: Path) -> int:
    ledger = output / "ledger.jsonl"
    return ledger.read_bytes().count(b"\n") if ledger.exists() else 0


def wait_for_lines(output: Path, count: int, process: subprocess.Popen, timeout_s: float = 180) -> None:
    deadline_s = time.monotonic() + timeout_s
    while lines(output) < count:
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline_s, f"only {lines(output)} lines"
        time.sleep(0.01)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """Every process that a job started."""
    return psutil.Process(process.pid).children(recursive=True)


def named(processes: list[psutil.Process], word: str) -> list[psutil.Process]:
    """Those whose command line begins with a word, by its file name: raylet, gcs_server, ray::..."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            command = process.cmdline()
            if command and Path(command[0]).name.startswith(word):
                found.append(process)
    return found


def wait_until_gone(processes: list[psutil.Process], timeout_s: float = 60) -> list[psutil.Process]:
    """Those that are still there."""
    return psutil.wait_procs(processes, timeout=timeout_s)[1]
