"""A job of a million inputs: what planning it and going on with it take."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

COUNT = 1_000_000

JOB = """
import json, sys, time
from pathlib import Path
from clipdit.fake_backend import FakeBackend
from clipdit.offline import run_job
from clipdit.offline.engine import model_of
from clipdit.translator import Translator

class Nothing:
    '''An engine that only counts what it is given.'''
    name = "nothing"
    def describe(self, sampling):
        return model_of(Translator(FakeBackend()), sampling)
    def run(self, items, work, finished):
        report["start_s"], report["start_cpu_s"] = time.monotonic() - start_s, time.process_time() - start_cpu_s
        report["count"] = sum(1 for _ in items)
        return work.batch_size

def peak_mb():  # of this program alone: getrusage's counts the parent that it was forked from
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

report = {"imports_mb": peak_mb()}
start_s, start_cpu_s = time.monotonic(), time.process_time()
report["kept"] = run_job(Nothing(), Path(sys.argv[1]), Path(sys.argv[2]), resume=True).kept
print(json.dumps(report | {"peak_mb": peak_mb()}))
"""


def run(manifest: Path, output: Path) -> dict:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", JOB, str(manifest), str(output)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_million_inputs_are_planned_within_a_gigabyte_and_resumed_within_two_minutes():
    # A folder with a short name: each byte of it is a megabyte of absolute paths.
    with tempfile.TemporaryDirectory() as folder:
        plan_and_resume(Path(folder))


def plan_and_resume(tmp_path: Path) -> None:
    manifest, out = tmp_path / "list.csv", tmp_path / "out"
    names = [f"part{i // 1000:04}/drawing_{i:07}.png" for i in range(COUNT)]
    manifest.write_text("source\n" + "\n".join(names) + "\n")
    planned = run(manifest, out)
    print("planned:", planned)
    assert planned["count"] == COUNT and planned["kept"] == 0

    # All but the last thousand are done: outputs are links to a few files, for a million files of their own would take 4 GB.
    data = b"x" * 1000
    digest = hashlib.sha256(data).hexdigest()
    for start in range(0, COUNT - 1000, 1000):
        (out / names[start]).parent.mkdir()
        if start % 50_000 == 0:
            original = out / f"original{start}"
            original.write_bytes(data)
        for name in names[start : start + 1000]:
            os.link(original, out / name)
    with (out / "ledger.jsonl").open("w") as stream:
        for name in names[: COUNT - 1000]:
            row = {
                "id": name,
                "input": f"{tmp_path}/{name}",
                "output": name,
                "status": "written",
                "reason": None,
                "sha256": digest,
            }
            stream.write(json.dumps(row | {"seed": 0, "notes": [], "ms": 12.345}) + "\n")
    resumed = run(manifest, out)
    print("resumed:", resumed)
    assert (resumed["count"], resumed["kept"]) == (1000, COUNT - 1000)
    assert planned["peak_mb"] < 1024 and resumed["peak_mb"] < 1100  # of both, PyTorch's libraries are 690
    assert resumed["start_s"] < 120
