"""`clipdit bench serve`, through real sockets."""

import json
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from serving import CLIPDIT, Running, numbered, png

from clipdit import cli

QUICK = ("--rates", "5", "60", "--seconds", "1", "--at-least", "5")


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIPDIT_API_KEY", raising=False)


def test_a_running_service_is_measured_and_counts_what_we_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CLIPDIT_API_KEY", "a-key-of-a-test")
    (tmp_path / "drawing.png").write_bytes(png(numbered(7)))
    service = Running("--max-batch", "1", "--queue", "1")
    try:
        out = tmp_path / "new" / "load.json"
        words = ["bench", "serve", "--url", f"{service.url}/", "--out", str(out), "--image", str(tmp_path / "drawing.png")]
        assert cli.main([*words, *QUICK]) == cli.DONE
    finally:
        log = service.stop()
    record = json.loads(out.read_text())
    table = capsys.readouterr().out
    assert set(record) == {"provenance", "service", "protocol", "capacity", "levels"}
    assert record["service"]["url"] == service.url and record["service"]["backend"] == "fake"
    assert record["protocol"]["arrivals"] == "poisson" and record["protocol"]["rates"] == [5, 60]
    assert {"date", "command", "versions", "hardware"} <= set(record["provenance"])
    few, many = record["levels"]
    assert (few["sent"], few["answered"], many["sent"]) == (5, 5, 60)
    for found in record["levels"]:
        assert found["sent"] == found["answered"] + found["refused"] + found["failed"] + found["hung"]
    # what the service wrote down, but for the one translation before
    asked = [line for line in log if line.get("route") == "/v1/translate"][1:]
    assert sum(line["status"] == 200 for line in asked) == few["answered"] + many["answered"]
    assert sum(line["status"] == 429 for line in asked) == few["refused"] + many["refused"]
    assert len(asked) == 65
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [line.split()[2] for line in table.splitlines()[3:5]] == ["5", "60"]
    assert table.splitlines()[-1] == f"wrote {out} and load.png"
    assert sorted(path.name for path in out.parent.iterdir()) == ["load.json", "load.png"]


def test_without_an_address_a_service_is_started_and_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "load.json"
    words = ["bench", "serve", "--backend", "fake", "--out", str(out), "--capacity-s", "0.5", "--callers", "2", "--json"]
    assert cli.main([*words, "--seconds", "0.2", "--at-least", "1"]) == cli.DONE
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(out.read_text())
    assert record["service"]["started"] == ["--backend", "fake"]
    assert record["capacity"]["per_s"] > 1 and len(record["levels"]) == 8
    host, _, port = record["service"]["url"].removeprefix("http://").partition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)


def test_what_cannot_be_measured_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def said(*words: str) -> str:
        assert cli.main(["bench", "serve", "--out", str(tmp_path / "load.json"), *words]) == cli.WRONG_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        return line

    with socket.create_server(("127.0.0.1", 0)) as taken:  # it was free a moment ago
        port = taken.getsockname()[1]
    (tmp_path / "no.png").write_text("no image")
    unreachable = said("--url", f"http://127.0.0.1:{port}")
    assert unreachable.startswith(f"clipdit: nothing answers at http://127.0.0.1:{port}: ")
    assert unreachable.endswith("Start it with `clipdit serve`, or leave out --url")
    assert said("--url", "127.0.0.1:8000").endswith("wanted an address such as http://127.0.0.1:8000")
    assert said("--url", "http://127.0.0.1:99999").startswith("clipdit: ")
    assert "leave out one of them" in said("--url", "http://127.0.0.1:8000", "--queue", "1")
    assert said("--rates", "0") == "clipdit: a rate is 0; wanted requests a second, more than 0"
    assert said("--out", str(tmp_path / "load.txt")).endswith("is no .json file; give a file for the numbers")
    assert said("--image", str(tmp_path / "no.png")).startswith("clipdit: ")
    assert said("--image", str(tmp_path / "absent.png")).startswith("clipdit: ")
    assert [path.name for path in tmp_path.iterdir()] == ["no.png"]


@pytest.mark.slow
def test_a_service_that_does_not_start_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["bench", "serve", "--out", str(tmp_path / "load.json"), "--backend", "fake", "--queue", "0"]
    assert cli.main(words) == cli.WRONG_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "clipdit: the service does not start: queue is 0; wanted more than 0"


@pytest.mark.slow
def test_a_load_test_that_is_ended_leaves_no_service_behind(tmp_path: Path):
    words = ["bench", "serve", "--backend", "fake", "--out", str(tmp_path / "load.json"), "--rates", "5", "--seconds", "60"]
    process = subprocess.Popen([CLIPDIT, *words], stderr=subprocess.PIPE, text=True)
    ours = psutil.Process(process.pid)
    while not any(child.net_connections() for child in ours.children()):  # it listens
        assert process.poll() is None
        time.sleep(0.2)
    children = ours.children(recursive=True)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert psutil.wait_procs(children, timeout=20)[1] == []
