"""Jobs on Ray: what the local engine makes, from the same plan, into the same ledger, and resumed by either."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray_models
from job_pictures import contents, draw, ledger
from PIL import Image
from ray_jobs import family, named, start_ray_job, wait_for_lines, wait_until_gone

from clipdit.cli import main
from clipdit.fake_backend import FakeBackend
from clipdit.offline import JobSettings, run_job, verify_job
from clipdit.translator import Translator
from clipdit_serve.offline.engine import RayEngine


def listeners() -> set[tuple[str, int, str]]:
    """Process, port and address of what this process and those it started listen at."""
    return {
        (process.name(), connection.laddr.port, connection.laddr.ip.removeprefix("::ffff:"))
        for process in named([psutil.Process(), *psutil.Process().children(recursive=True)], "")
        for connection in process.net_connections("inet")
        if connection.status == "LISTEN"
    }


@pytest.fixture(scope="module")
def others():
    """What listened before Ray did: tests that came before in the same process may have left something."""
    return listeners()


@pytest.fixture(scope="class")
def engine(others):
    """Ray, started once for those who share it, whose workers find the models of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(ray_models.__file__).parent))
        engine = RayEngine(ray_models.open_small)
        yield engine
        engine.close()


@pytest.fixture
def inputs(tmp_path):
    for i in range(20):
        draw(tmp_path / "in" / ["", "sub"][i % 2] / f"{i:02}.png", 20 + 7 * i, 100 - 3 * i, seed=i)
    return tmp_path / "in"


@pytest.fixture
def start():
    """Starts jobs in processes of their own, and ends those that are left."""
    started = []

    def start(*arguments, **options):
        started.append(start_ray_job(*arguments, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def rows(folder) -> dict[str, dict]:
    """The ledger by id, without times."""
    return {row["id"]: row | {"ms": 0} for row in ledger(folder)}


class TestOnOneRay:
    def test_outputs_and_ledger_are_the_local_engines_to_the_last_byte_odd_files_and_halved_batches_included(
        self, engine, odd_images, tmp_path
    ):
        settings = JobSettings(keep_suffix=True, seed=3)
        on_ray = run_job(engine, odd_images.folder, tmp_path / "ray", settings, batch_size=8)
        here = run_job(Translator(FakeBackend(native_size=(32, 32))), odd_images.folder, tmp_path / "local", settings)
        assert dataclasses.replace(on_ray, seconds=0, batch_size=0) == dataclasses.replace(here, seconds=0, batch_size=0)
        assert on_ray.batch_size <= 2 and on_ray.quarantined > 10 and on_ray.written > 20
        assert contents(tmp_path / "ray") == contents(tmp_path / "local")
        assert rows(tmp_path / "ray") == rows(tmp_path / "local")
        assert verify_job(tmp_path / "ray").ok and [p.name for p in (tmp_path / "ray" / ".clipdit").iterdir()] == ["lock"]
        progress = json.loads((tmp_path / "ray" / "progress.json").read_text())
        assert (progress["engine"], progress["state"], progress["finished"]) == ("ray", "done", on_ray.total)

    def test_a_job_begun_with_one_engine_is_finished_by_the_other(self, engine, inputs, tmp_path):
        local, out = Translator(FakeBackend(native_size=(32, 32))), tmp_path / "out"
        run_job(local, inputs, tmp_path / "unbroken")
        for first, second in ((local, engine), (engine, local)):
            run_job(first, inputs, out, resume=True)
            ledger_path = out / "ledger.jsonl"
            kept = ledger_path.read_text().splitlines(keepends=True)[:12]
            ledger_path.write_text("".join(kept) + '{"id": "cut sh')
            (out / json.loads(kept[0])["output"]).unlink()
            summary = run_job(second, inputs, out, resume=True)
            assert (summary.kept, summary.written) == (11, 9)
            assert contents(out) == contents(tmp_path / "unbroken") and rows(out) == rows(tmp_path / "unbroken")

    def test_listens_where_no_other_machine_reaches_it(self, engine, others):
        engine.describe({})
        ours = listeners() - others
        assert {"raylet", "gcs_server"} <= {name for name, _, _ in ours}
        assert not [listener for listener in ours if listener[2] not in ("127.0.0.1", "::1")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["in", "out", "--engine", "spark"], "there is no engine spark; there are local, ray"),
        (["in/00.png", "out.png", "--engine", "ray"], "--engine ray is for folders and manifests"),
        (["in", "out", "--replicas", "2"], "--replicas is for --engine ray"),
        (["in", "out", "--engine", "ray", "--replicas", "0"], "replicas is 0"),
        (["in", "out", "--engine", "ray", "--device", "cuda:1"], "with --engine ray it is cpu or cuda"),
        (["in", "in", "--engine", "ray"], "not empty"),
    ],
)
def test_what_cannot_be_is_one_line_before_ray_is_started(inputs, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["translate", *words, "--backend", "fake"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_that_hangs_and_one_that_breaks_end_in_one_error_and_the_job_goes_on(inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for open_translator, error, message in (
        (ray_models.open_hanging, ValueError, "no progress for 60 s.* --resume"),
        (ray_models.open_broken, RuntimeError, "device-side assert"),
    ):
        monkeypatch.setenv("PYTHONPATH", str(Path(ray_models.__file__).parent))
        engine = RayEngine(open_translator, no_progress_s=60)
        try:
            with pytest.raises(error, match=message):
                run_job(engine, inputs, out, resume=True)
        finally:
            engine.close()
        assert json.loads((out / "progress.json").read_text())["state"] == "failed"
    assert run_job(Translator(FakeBackend(native_size=(32, 32))), inputs, out, resume=True).written == 20
    assert verify_job(out).ok


VICTIMS = ("ray::MapBatches(", "ray::MapWorker", "driver", "raylet", "gcs_server")
"""What reads, what translates, the job itself, and the two processes that Ray consists of."""


def kill_one(victim: str, process: subprocess.Popen) -> None:
    """kill -9; a worker of Ray's may just be starting anew, and is waited for."""
    if victim == "driver":
        return process.kill()
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and process.poll() is None:
        relatives = family(process)
        found = named(relatives, victim)
        if victim.startswith("ray::"):  # more follows on the line: the part of the model's, and its number
            found = [worker for worker in named(relatives, "ray::") if victim in "".join(worker.cmdline())]
        for target in found[:1]:
            return target.kill()
        time.sleep(0.01)
    pytest.fail(f"there was no {victim} to kill")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_files_killed_twenty_times_equal_an_unbroken_run(start, tmp_path):
    """kill -9 at random moments. What a dead Ray leaves ends by itself, and the next run does not wait for it."""
    rng, source, out = random.Random(1), tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i in range(10_000):
        bad = i % 100 == 7
        path = source / f"{i:05}.png"
        path.write_bytes(rng.randbytes(40)) if bad else Image.frombytes("RGB", (8, 8), rng.randbytes(192)).save(path)
    moments = sorted(rng.sample(range(1, 9_000), 20))
    victims = rng.sample(VICTIMS * 4, 20)
    log, again, left = tmp_path / "log", [], []
    process = start(source, out, log=log)
    for victim, count in zip(victims, moments, strict=True):
        wait_for_lines(out, count, process, timeout_s=500)
        time.sleep(rng.uniform(0, 0.3))
        relatives = family(process)
        kill_one(victim, process)
        if victim.startswith("ray::"):
            continue  # the job goes on
        assert process.wait(200) == (-signal.SIGKILL if victim == "driver" else 1)
        written = (out / "ledger.jsonl").read_text().count('"status": "written"')
        again.append(sum(1 for _ in out.glob("*.png")) - written)  # in place, but not in the ledger
        assert not verify_job(out).ok
        left += relatives  # the next run begins while they end: Ray's agents take a minute
        process = start(source, out, log=log)
    assert process.wait(600) == 0, log.read_text()[-2000:]
    verdict = verify_job(out)
    assert verdict.ok and (verdict.written, len(verdict.quarantined)) == (9_900, 100)
    ids = [row["id"] for row in ledger(out)]
    assert len(set(ids)) == len(ids) == 10_000
    assert [p.name for p in (out / ".clipdit").iterdir()] == ["lock"] and not list(out.rglob("*.part"))
    run_job(Translator(FakeBackend(native_size=(32, 32))), source, tmp_path / "unbroken")
    assert contents(out) == contents(tmp_path / "unbroken") and rows(out) == rows(tmp_path / "unbroken")
    assert max(again) <= 256, f"made but not in the ledger: {again}"
    assert wait_until_gone(left, timeout_s=180) == []
    print("written but not in the ledger at each kill:", again)


CLUSTER = """
import ray, sys
context = ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
print("at", context.address_info["gcs_address"], flush=True)
sys.stdin.read()
print("nodes", sum(node["Alive"] for node in ray.nodes()), flush=True)
"""


@pytest.mark.slow
def test_a_cluster_that_is_there_is_used_and_left_running(inputs, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert cluster.stdin is not None and cluster.stdout is not None
    try:
        address = next(line.split()[1] for line in cluster.stdout if line.startswith("at "))
        words = ["translate", str(inputs), str(tmp_path / "out"), "--engine", "ray", "--backend", "fake"]
        command = [sys.executable, "-c", f"import sys; from clipdit.cli import main; sys.exit(main({words!r}))"]
        done = subprocess.run(command, env=environment | {"RAY_ADDRESS": address}, capture_output=True, text=True)
        assert done.returncode == 0 and f"Ray at {address}, 4 CPUs" in done.stderr, done.stderr
        refused = subprocess.run(
            [*command[:2], command[2].replace("out'", "out2'").replace("'ray'", "'ray', '--replicas', '9'")],
            env=environment | {"RAY_ADDRESS": address},
            capture_output=True,
            text=True,
        )
        assert refused.returncode == 2 and "replicas is 9; with 4 CPUs and 0 GPUs Ray has room for 1" in refused.stderr
        rest, _ = cluster.communicate("")
        assert "nodes 1" in rest
    finally:
        cluster.kill()
    assert verify_job(tmp_path / "out").written == 20
