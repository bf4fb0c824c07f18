"""A real Triton Inference Server takes the repository as it is written, and answers over HTTP as the translator does. On the CPU.

Needs the server's program, which the wheel of nvidia-pytriton holds. `make test-triton` fetches it, once, and runs this; by hand:

    pip install --no-deps --target /tmp/pytriton nvidia-pytriton==0.7.0
    CLIPDIT_TRITON_SERVER=/tmp/pytriton pytest tests/export/test_triton_server.py

Nothing is written into that folder.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
import torch

from clipdit.testing import TOLERANCES
from clipdit.translator import Translator
from clipdit_export.build import build
from clipdit_export.order import Order
from clipdit_export.triton_repository import write_repository

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # two exports and a server's start, on a machine that may be busy
    pytest.mark.skipif(
        "CLIPDIT_TRITON_SERVER" not in os.environ,
        reason="needs CLIPDIT_TRITON_SERVER, a folder with the wheel of nvidia-pytriton in it; `make test-triton` makes one",
    ),
]

BACKEND = "onnx:onnx-fp32"
START_S, STOP_S, ANSWER_S = 400, 60, 60  # what is longer is a failure
GATHER_MS = 1500  # how long "emoji" and "narrow" wait for company: longer than a few threads take to send


@dataclass(frozen=True)
class Server:
    port: int
    metrics_port: int
    repository: Path
    at_start: dict[str, dict] = field(default_factory=dict)
    """The statistics of each model when the server had become ready."""

    def ask(
        self, path: str, body: bytes | None = None, *, port: int | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers with small names, body) of a GET, or of a POST when there is a body."""
        connection = HTTPConnection("127.0.0.1", port or self.port, timeout=ANSWER_S)
        try:
            connection.request(
                "GET" if body is None else "POST", path, body, {k.replace("_", "-"): v for k, v in headers.items()}
            )
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def is_ready(self) -> bool:
        try:
            return self.ask("/v2/health/ready")[0] == 200
        except OSError:
            return False

    def metrics(self, model: str) -> dict[str, float]:
        """Of a model, for Prometheus: `name` or `name{reason}` -> value."""
        text = self.ask("/metrics", port=self.metrics_port)[2].decode()
        found = {}
        for name, labels, value in re.findall(r"^(\w+)\{([^}]*)\} (\S+)$", text, re.MULTILINE):
            told = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if told.get("model") == model:
                found[name + (f"{{{told['reason']}}}" if "reason" in told else "")] = float(value)
        return found

    def statistics(self, model: str) -> dict:
        return json.loads(self.ask(f"/v2/models/{model}/stats")[2])["model_stats"][0]

    def batches(self, model: str) -> dict[int, int]:
        """How often a batch of a size has run."""
        return {batch["batch_size"]: batch["compute_infer"]["count"] for batch in self.statistics(model).get("batch_stats", [])}

    def infer(self, model: str, source_u8: torch.Tensor, seeds: list[int]) -> np.ndarray | tuple[int, str]:
        """image_u8, or the status and the error. With KServe's binary extension."""
        arrays = {"source_u8": source_u8.numpy(), "seed": np.array(seeds, dtype=np.int64)[:, None]}
        head: dict = {"inputs": [], "outputs": [{"name": "image_u8", "parameters": {"binary_data": True}}]}
        for name, array in arrays.items():
            tensor = {"name": name, "datatype": array.dtype.name.upper(), "shape": array.shape}
            head["inputs"].append({**tensor, "parameters": {"binary_data_size": array.nbytes}})
        words = json.dumps(head).encode()
        body = words + b"".join(array.tobytes() for array in arrays.values())
        status, headers, answer = self.ask(f"/v2/models/{model}/infer", body, Inference_Header_Content_Length=str(len(words)))
        if status != 200:
            return status, json.loads(answer)["error"]
        length = int(headers.get("inference-header-content-length", len(answer)))  # absent when no bytes follow
        (told,) = json.loads(answer[:length])["outputs"]
        assert told["name"] == "image_u8" and told["datatype"] == "UINT8"
        return np.frombuffer(answer[length:], dtype=np.uint8).reshape(told["shape"])

    def infer_together(self, model: str, sources: list[torch.Tensor], seeds: list[int]) -> list[np.ndarray | tuple[int, str]]:
        """Requests of one image each, all sent at once."""
        with ThreadPoolExecutor(len(seeds)) as pool:
            return list(pool.map(lambda given: self.infer(model, given[0][None], [given[1]]), zip(sources, seeds, strict=True)))


@pytest.fixture(scope="module")
def repository(bundle: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models "emoji"; "narrow", two of whose requests may wait; and "sizes", which takes two of them."""
    folder = tmp_path_factory.mktemp("triton")
    build(checkpoint, folder / "sizes", Order(sizes=((32, 32), (32, 48)), max_batch=4, images=1))
    write_repository(bundle, folder / "models", name="emoji", backend=BACKEND, delay_ms=GATHER_MS)
    write_repository(bundle, folder / "models", name="narrow", backend=BACKEND, delay_ms=GATHER_MS, queue=2)
    write_repository(folder / "sizes", folder / "models", name="sizes")
    return folder / "models"


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    """The server, ready; it is asked to stop at the end, and has to."""
    wheel = Path(os.environ["CLIPDIT_TRITON_SERVER"]).resolve()
    program = wheel / "pytriton" / "tritonserver"
    backends = repository.with_name("backends")
    shutil.copytree(program / "backends", backends)
    # The Python backend starts a "stub", a program of the server's with Python in it. It ignores PYTHONPATH, but it finds its
    # packages as `python3` on the PATH would: in our virtual environment. Its libpython has to be of the same Python.
    stub = f"python_backend_stubs/{sys.version_info.major}.{sys.version_info.minor}/triton_python_backend_stub"
    shutil.copy(program / stub, backends / "python")
    libraries = [str(wheel / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
    }
    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
        port, metrics_port = one.getsockname()[1], other.getsockname()[1]
    words = ["--allow-grpc=false", "--http-address=127.0.0.1", f"--http-port={port}"]
    words += ["--metrics-address=127.0.0.1", f"--metrics-port={metrics_port}", "--metrics-interval-ms=100"]
    words += [f"--model-repository={repository}", f"--backend-directory={backends}"]
    log = repository.with_name("log")
    with log.open("wb") as out:
        process = subprocess.Popen([program / "bin" / "tritonserver", *words], env=environment, stdout=out, stderr=out)
    try:
        made = Server(port, metrics_port, repository)
        until = time.monotonic() + START_S
        while not made.is_ready():
            ended = process.poll() is not None
            assert not ended and time.monotonic() < until, f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}"
            time.sleep(0.2)
        made.at_start.update({model: made.statistics(model) for model in ("emoji", "narrow", "sizes")})
        yield made
    finally:
        process.terminate()
        try:
            status = process.wait(STOP_S)
        finally:
            process.kill()  # does nothing to one that has ended
            process.wait()
    assert status == 0 and not made.is_ready()


@pytest.fixture(scope="module")
def translator(bundle: Path) -> Iterator[Translator]:
    with Translator.open(bundle, backend=BACKEND) as made:
        yield made


def images(count: int, seed: int, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def same(image: np.ndarray | tuple[int, str], wanted: torch.Tensor) -> bool:
    assert isinstance(image, np.ndarray), image
    assert image.shape == tuple(wanted.shape)
    return np.abs(image.astype(int) - wanted.numpy().astype(int)).max() <= TOLERANCES[torch.float32].levels


@pytest.mark.parametrize("model", ["emoji", "sizes"])
def test_the_server_tells_the_metadata_that_were_written_and_the_model_is_warm(server: Server, model: str):
    status, _, told = server.ask(f"/v2/models/{model}")
    assert status == 200 and json.loads(told) == json.loads((server.repository / model / "metadata.json").read_text())
    assert server.ask(f"/v2/models/{model}/versions/1/ready")[0] == 200
    assert server.at_start[model]["inference_count"] == 1  # the warm-up, before anybody asked


def test_the_server_reads_the_description_as_it_was_meant(server: Server):
    told = json.loads(server.ask("/v2/models/narrow/config")[2])
    batching = told["dynamic_batching"]
    assert told["max_batch_size"] == 4 and batching["max_queue_delay_microseconds"] == 1000 * GATHER_MS
    assert batching["default_queue_policy"]["max_queue_size"] == 2 and told["parameters"]["backend"]["string_value"] == BACKEND
    assert [(group["kind"], group["count"]) for group in told["instance_group"]] == [("KIND_CPU", 1)]


def test_an_image_and_a_seed_give_the_translators_image(server: Server, translator: Translator):
    source = images(1, seed=7)
    wanted = translator(source, seeds=[2**62 + 7])
    assert not same(wanted.numpy(), translator(source, seeds=[8]))  # so that the seed matters
    assert same(server.infer("emoji", source, [2**62 + 7]), wanted)
    assert same(server.infer("emoji", images(3, seed=1), [1, 2, 3]), translator(images(3, seed=1), seeds=[1, 2, 3]))


def test_alive_and_ready_are_told_and_metrics_count_what_was_asked(server: Server):
    assert [server.ask(f"/v2/health/{what}")[0] for what in ("live", "ready")] == [200, 200]
    before = server.metrics("emoji")
    assert isinstance(server.infer("emoji", images(2, seed=2), [1, 2]), np.ndarray)
    after = server.metrics("emoji")
    assert after["nv_inference_request_success"] == before["nv_inference_request_success"] + 1
    assert after["nv_inference_count"] == before["nv_inference_count"] + 2
    assert after["nv_inference_pending_request_count"] == 0


def test_json_without_the_binary_extension_does_too(server: Server, translator: Translator):
    source = images(1, seed=9)
    tensor = {"name": "source_u8", "datatype": "UINT8", "shape": list(source.shape), "data": source.flatten().tolist()}
    seed = {"name": "seed", "datatype": "INT64", "shape": [1, 1], "data": [9]}
    status, _, answer = server.ask("/v2/models/emoji/infer", json.dumps({"inputs": [tensor, seed]}).encode())
    assert status == 200, answer
    (told,) = json.loads(answer)["outputs"]
    assert same(np.array(told["data"], dtype=np.uint8).reshape(told["shape"]), translator(source, seeds=[9]))


def test_requests_that_come_together_are_one_batch_and_each_gets_its_own_image(server: Server, translator: Translator):
    sources, seeds = list(images(4, seed=3)), [11, 12, 13, 14]
    before = server.batches("emoji").get(4, 0)
    answers = server.infer_together("emoji", sources, seeds)
    assert server.batches("emoji")[4] == before + 1
    wanted = [translator(source[None], seeds=[seed]) for source, seed in zip(sources, seeds, strict=True)]
    assert all(same(answer, own) for answer, own in zip(answers, wanted, strict=True))
    assert not same(wanted[0].numpy(), wanted[1])


def test_a_model_of_several_sizes_takes_each_of_them(server: Server):
    with Translator.open(server.repository / "sizes" / "1" / "bundle") as translator:
        for size in ((32, 32), (32, 48)):
            source = images(2, seed=5, size=size)
            assert same(server.infer("sizes", source, [1, 2]), translator(source, seeds=[1, 2]))


@pytest.mark.parametrize(
    ("model", "size", "seeds", "reason"),
    [
        (
            "emoji",
            (64, 64),
            [1],
            "unexpected shape for input 'source_u8' for model 'emoji'. Expected [-1,3,32,32], got [1,3,64,64]",
        ),
        ("emoji", (32, 32), [1, 2, 3, 4, 5], "batch-size must be <= 4 for 'emoji'"),
        ("emoji", (32, 32), [-1], "seed is -1; wanted an integer from 0 to 2**63 - 1"),
        ("sizes", (64, 64), [1], "image is 64 x 64; this backend takes 32 x 32, 48 x 32. Resize, or export with that size"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    server: Server, model: str, size: tuple[int, int], seeds: list[int], reason: str
):
    status, error = server.infer(model, images(len(seeds), seed=1, size=size), seeds)
    assert status == 400 and reason in error and "\n" not in error
    assert server.is_ready() and isinstance(server.infer(model, images(1, seed=1), [1]), np.ndarray)


def test_a_seed_that_cannot_be_spoils_no_other_request_of_its_batch(server: Server, translator: Translator):
    sources = list(images(4, seed=6))
    before = server.batches("emoji").get(4, 0)
    good, bad, *others = server.infer_together("emoji", sources, [1, -2, 3, 4])
    assert server.batches("emoji")[4] == before + 1
    assert bad == (400, "seed is -2; wanted an integer from 0 to 2**63 - 1")
    for answer, source, seed in zip((good, *others), (sources[0], *sources[2:]), (1, 3, 4), strict=True):
        assert same(answer, translator(source[None], seeds=[seed]))


def test_a_full_queue_refuses_at_once_and_serves_those_who_wait(server: Server, translator: Translator):
    sources, seeds = list(images(6, seed=8)), list(range(6))
    before = server.metrics("narrow")["nv_inference_request_success"]
    answers = server.infer_together("narrow", sources, seeds)
    refused = [answer for answer in answers if isinstance(answer, tuple)]
    # 2.51 counts who was refused at a full queue nowhere, under no reason of nv_inference_request_failure
    assert server.metrics("narrow")["nv_inference_request_success"] == before + 2
    assert len(refused) == 4 and all(status == 503 and "Exceeds maximum queue size" in error for status, error in refused)
    for source, seed, answer in zip(sources, seeds, answers, strict=True):
        assert isinstance(answer, tuple) or same(answer, translator(source[None], seeds=[seed]))
    assert same(server.infer("narrow", sources[0][None], [0]), translator(sources[0][None], seeds=[0]))
