"""`clipdit serve` as a process of its own, through a real socket."""

import asyncio
import base64
import contextlib
import itertools
import json
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import openai
import pytest
import torch
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from serving import PNG, Running, numbered, png

from clipdit import cli
from clipdit.fake_backend import FakeBackend
from clipdit.images import read_image
from clipdit.translator import Translator

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
IMAGE = png(numbered(7))
KEY = "a-key-of-a-test"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    service = Running(
        "--model-name", "edges", "--max-batch", "2", "--metrics-port", "0", environment={"CLIPDIT_API_KEY": KEY}
    )  # fmt: skip
    yield service
    service.stop()


def client(running: Running) -> httpx2.Client:
    return httpx2.Client(base_url=running.url, headers={"authorization": f"Bearer {KEY}"}, timeout=20)


def test_the_one_line_says_where_and_the_service_is_ready_by_then(running: Running):
    assert json.loads(running.line) == {"url": running.url, "model": "edges", "metrics": metrics_url(running)}
    assert running.address[0] == "127.0.0.1"
    assert httpx2.get(f"{running.url}/readyz").json() == {"status": "ready"}
    assert httpx2.get(f"{running.url}/v1/models").status_code == 401


def metrics_url(running: Running) -> str:
    return json.loads(running.line)["metrics"]


def test_prometheus_reads_the_metrics_at_their_own_port_without_the_key(running: Running):
    at = metrics_url(running)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", at) and at != f"{running.url}/metrics"
    families = {family.name for family in text_string_to_metric_families(httpx2.get(at).text)}
    assert {"clipdit_requests", "clipdit_queue_depth", "clipdit_model"} <= families
    with client(running) as ours:
        assert ours.get("/metrics").status_code == 404
    assert httpx2.get(at.replace("/metrics", "/v1/models")).status_code == 404
    assert httpx2.get(at.replace("/metrics", "/readyz")).json() == {"status": "ready"}


def test_the_official_client_translates_over_the_network(running: Running):
    wanted = Translator(FakeBackend()).translate_image(numbered(7), seed=1)
    ours = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0)
    answer = ours.images.edit(image=("drawing.png", IMAGE), prompt="", extra_body={"seed": 1})
    assert torch.equal(read_image(base64.b64decode(answer.data[0].b64_json)), wanted)


def test_the_lines_of_the_documentation_are_true(running: Running, tmp_path: Path):
    """Each curl line, and the Python block, with the address and the key of this service put in."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    (tmp_path / "drawing.png").write_bytes(IMAGE)
    text = PAGE.read_text().replace("http://127.0.0.1:8000", running.url)
    curls = re.findall(r"^curl .*$", text.partition("## Jobs")[0], re.MULTILINE)
    assert len(curls) == 2
    for line in curls:
        line = line.replace("curl ", f"curl -sS -H 'Authorization: Bearer {KEY}' ", 1)
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    wanted = Translator(FakeBackend()).translate_image(numbered(7), seed=1)
    assert torch.equal(read_image(tmp_path / "emoji.png"), wanted)
    assert (tmp_path / "emoji.webp").read_bytes()[8:12] == b"WEBP"
    (tmp_path / "emoji.png").unlink()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    code = code.replace('api_key="anything"', f'api_key="{KEY}"')
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert torch.equal(read_image(tmp_path / "emoji.png"), wanted)


def test_the_lines_of_the_documentation_on_jobs_are_true(running: Running, tmp_path: Path):
    """As one script, since each line needs the one before."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    (tmp_path / "drawing.png").write_bytes(IMAGE)
    (script,) = re.findall(r"^## Jobs.*?^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    script = script.replace("http://127.0.0.1:8000", running.url).replace("curl ", f"curl -H 'Authorization: Bearer {KEY}' ")
    done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    id = json.loads((tmp_path / "job.json").read_text())["id"]
    assert re.findall(r"^event: (\w+)$", done.stdout, re.MULTILINE) == ["queued", "running", "done"]
    assert [json.loads(line)["id"] for line in re.findall(r"^data: (.*)$", done.stdout, re.MULTILINE)] == [id] * 3
    assert [json.loads(line)["status"] for line in re.findall(r"{[^{}]*}", done.stdout)[-2:]] == ["done", "done"]
    assert (tmp_path / "emoji.webp").read_bytes()[8:12] == b"WEBP"
    with client(running) as ours:
        assert ours.get(f"/v1/jobs/{id}").status_code == 404


def test_a_broken_stream_of_events_goes_on_where_it_broke(running: Running):
    with client(running) as ours:
        path = ours.post("/v1/jobs", content=IMAGE, headers=PNG).headers["location"]
        with ours.stream("GET", f"{path}/events") as stream:
            first = next(stream.iter_text())  # and leave
        assert first.startswith("event: queued\n")
        rest = ours.get(f"{path}/events", headers={"last-event-id": "1"})
        assert re.findall(r"^id: (\d+)$", rest.text, re.MULTILINE) == ["2", "3"]
        assert ours.get(f"{path}/events", headers={"last-event-id": "3"}).status_code == 204
        assert ours.delete(path).json()["status"] == "done"


def test_a_body_over_the_limit_is_answered_before_it_is_sent(running: Running):
    with socket.create_connection(running.address, timeout=10) as connection:
        head = f"POST /v1/translate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        connection.sendall(f"{head}Content-Type: image/png\r\nContent-Length: 1000000000\r\n\r\n".encode())
        answer = b""
        while not answer.endswith(b"}}"):
            answer += connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ") and b'"body_too_large"' in answer


def test_who_sends_all_of_a_body_that_is_too_large_still_gets_the_answer(running: Running):
    with client(running) as ours:
        answer = ours.post("/v1/translate", content=bytes(25 * 2**20), headers=PNG)
    assert (answer.status_code, answer.headers["x-clipdit-error"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /v1/translate HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /v1/translate HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/translate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /livez\r\n\r\n" * 3,
    ],
    ids=["two lengths", "negative length", "two encodings", "large head", "TLS", "no version"],
)
def test_what_is_no_http_is_refused_and_the_next_one_is_served(request_bytes: bytes, running: Running):
    with socket.create_connection(running.address, timeout=10) as connection:
        answer = b""
        with contextlib.suppress(ConnectionError):
            connection.sendall(request_bytes)
            answer = connection.recv(65536)
    assert answer == b"" or int(answer.split()[1]) in (400, 401, 431, 501), answer[:200]
    assert httpx2.get(f"{running.url}/livez").status_code == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"Content-Length: 5\r\nTransfer-Encoding: chunked", 400),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 5", 400),
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", 501),
        (b"Transfer-Encoding: xchunked", 501),
        (b"Transfer-Encoding : chunked", 400),
        (b"Transfer-Encoding:\x0bchunked", 400),
        (b"Content-Length : 5", 400),
        (b"Content-Length: +5", 400),
        (b"Content-Length: 5, 6", 400),
        (b"Content-Length: 0x5", 400),
        (b"X: a\x00b", 400),
    ],
)
def test_no_request_hides_in_the_body_of_another(head: bytes, status: int, running: Running):
    """Where a proxy in front may see another length than we, the connection ends: what is behind the head is never answered."""
    mine = b"Host: x\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n"
    sent = b"POST /v1/models HTTP/1.1\r\n" + mine + head + b"\r\n\r\n0\r\n\r\n" + b"GET /v1/models HTTP/1.1\r\n" + mine + b"\r\n"
    with socket.create_connection(running.address, timeout=10) as connection:
        connection.sendall(sent)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(65536):
                answer += data
    assert re.findall(rb"HTTP/1\.1 (\d+) ", answer) in ([str(status).encode()], [b"400"]), answer[:300]
    assert b"owned_by" not in answer


def test_callers_who_send_slowly_do_not_slow_the_others(running: Running):
    def median_s() -> float:
        times_s = []
        with client(running) as ours:
            for _ in range(40):
                began = time.perf_counter()
                assert ours.post("/v1/translate", content=IMAGE, headers=PNG).status_code == 200
                times_s.append(time.perf_counter() - began)
        return statistics.median(times_s)

    alone_s = [median_s()]
    slow = []
    for _ in range(100):
        connection = socket.create_connection(running.address, timeout=10)
        head = f"POST /v1/translate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: image/png\r\n"
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\nx".encode())
        slow.append(connection)
    for _ in range(100):  # and heads that never end
        connection = socket.create_connection(running.address, timeout=10)
        connection.sendall(b"POST /v1/translate HTTP/1.1\r\nX: ")
        slow.append(connection)
    beside_s = median_s()
    for connection in slow:
        connection.close()
    alone_s.append(median_s())
    print(f"\nmedians: beside 200 slow senders {1000 * beside_s:.1f} ms, alone before and after {[1000 * s for s in alone_s]} ms")
    assert beside_s < 2 * max(alone_s) + 0.02


def test_callers_who_leave_are_counted_and_leave_nothing_behind(running: Running):
    def cancelled() -> float:
        (line,) = [
            line for line in httpx2.get(metrics_url(running)).text.splitlines() if line.startswith("clipdit_cancelled_total")
        ]
        return float(line.split()[1])

    with client(running) as ours:
        before = settled(cancelled)
        for _ in range(20):
            with socket.create_connection(running.address, timeout=10) as connection:
                head = f"POST /v1/translate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: image/png\r\n"
                connection.sendall(f"{head}Content-Length: {len(IMAGE)}\r\n\r\n".encode() + IMAGE[:-1])
        assert settled(cancelled) - before == 20
        assert ours.get("/readyz?verbose").json()["admitted"] == 0


def settled(read: Callable[[], float]) -> float:
    """A figure when it has not changed for half a second."""
    value = read()
    for _ in range(40):
        time.sleep(0.5)
        value, before = read(), value
        if value == before:
            break
    return value


@pytest.mark.anyio
async def test_sigterm_under_load_loses_no_admitted_request_and_readyz_says_503_within_a_second(running: Running):
    """The last test of this service."""
    outcomes: list[tuple[str, int, str | None]] = []
    unanswered: list[str] = []

    async def ask_and_ask_again(caller: int) -> None:
        headers = PNG | {"authorization": f"Bearer {KEY}"}
        for count in itertools.count():
            id = f"load-{caller}-{count}"
            try:
                async with httpx2.AsyncClient(timeout=20) as ours:  # a connection of its own
                    answer = await ours.post(f"{running.url}/v1/translate", content=IMAGE, headers=headers | {"x-request-id": id})
            except httpx2.TransportError:  # the port is closed, or was while this one knocked
                unanswered.append(id)
                return
            outcomes.append((id, answer.status_code, answer.headers.get("x-clipdit-error")))

    callers = [asyncio.create_task(ask_and_ask_again(caller)) for caller in range(8)]
    async with httpx2.AsyncClient(base_url=running.url) as ours:
        while len(outcomes) < 100:
            await asyncio.sleep(0.01)
        running.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        while (answer := await ours.get("/readyz")).status_code == 200:
            await asyncio.sleep(0.01)
        unready_s = time.monotonic() - began
    assert answer.json() == {"status": "draining"}
    print(f"\n503 after {unready_s:.2f} s")
    assert unready_s < 5  # SERVE: 1 s, where other tests do not take the cores
    await asyncio.gather(*callers)
    assert await asyncio.to_thread(running.process.wait, 20) == 0
    assert {(status, error) for _, status, error in outcomes} == {(200, None), (503, "draining")}
    lines = [line for line in running.stop() if str(line.get("request_id")).startswith("load-")]
    # what came in was answered, and what was not answered never came in
    assert sorted([(line["request_id"], line["status"], line["error"]) for line in lines], key=str) == sorted(outcomes, key=str)
    assert len(unanswered) == 8 and not {line["request_id"] for line in lines} & set(unanswered)


def test_after_sigterm_accepted_jobs_are_finished_and_the_process_waits_until_they_are_fetched():
    service = Running("--max-batch", "1", "--linger-s", "0")
    wanted = Translator(FakeBackend()).translate_image(numbered(7), seed=1)
    with httpx2.Client(base_url=service.url, timeout=20) as ours:
        paths = [ours.post("/v1/jobs?seed=1", content=IMAGE, headers=PNG).headers["location"] for _ in range(5)]
        service.process.send_signal(signal.SIGTERM)
        while ours.get("/readyz").status_code == 200:
            time.sleep(0.01)
        refused = ours.post("/v1/jobs", content=IMAGE, headers=PNG)
        assert (refused.status_code, refused.headers["x-clipdit-error"]) == (503, "draining")
        for path in paths:
            assert ours.get(f"{path}/events").text.count("event: done\n") == 1
        time.sleep(0.5)
        assert service.process.poll() is None  # all are done, and nobody has them
        for path in paths:
            assert torch.equal(read_image(ours.get(f"{path}/result").content), wanted)
    assert service.process.wait(10) == 0
    lines = service.stop()
    assert [line["message"] for line in lines].count("job done") == 5
    assert not [line for line in lines if line["level"] != "INFO"]


@pytest.mark.slow
def test_control_c_ends_it_at_once_with_130():
    service = Running("--linger-s", "60")
    began = time.monotonic()
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(20) == cli.INTERRUPTED
    assert time.monotonic() - began < 15
    assert [line for line in service.stop() if line["level"] != "INFO"] == []


def test_what_cannot_be_served_is_one_line_and_exit_code_2(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CLIPDIT_API_KEY", raising=False)
    assert cli.main(["serve", "--backend", "fake", "--host", "0.0.0.0"]) == cli.WRONG_INPUT
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("clipdit: --host 0.0.0.0 lets others in, and no key is set.")
    assert cli.main(["serve", "--backend", "fake", "--queue", "0"]) == cli.WRONG_INPUT
    assert capfd.readouterr().err == "clipdit: queue is 0; wanted more than 0\n"


def test_a_model_that_cannot_be_opened_is_one_line_and_exit_code_2(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert cli.main(["serve", "--model", str(tmp_path), "--port", "0"]) == cli.WRONG_INPUT
    output = capfd.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("clipdit: ") and str(tmp_path) in line


def test_a_port_that_is_taken_is_one_line_and_exit_code_2_before_anything_is_opened(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail(f"{thread.name} was started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--backend", "fake", "--port", str(port)]) == cli.WRONG_INPUT
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"clipdit: cannot listen at 127.0.0.1:{port}: ") and line.endswith("Choose another --port")


def test_a_metrics_port_that_is_taken_or_the_services_own_is_one_line_and_exit_code_2(capfd: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "--backend", "fake", "--port", "0", "--metrics-port", port]) == cli.WRONG_INPUT
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"clipdit: cannot listen at 127.0.0.1:{port}: ") and line.endswith("Choose another --metrics-port")
    assert cli.main(["serve", "--backend", "fake", "--port", port, "--metrics-port", port]) == cli.WRONG_INPUT
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"clipdit: --metrics-port is {port}, and so is --port; choose another one, or leave it out"
