"""A `clipdit serve --engine ray` to test: its processes, its model's orders, and a client that counts what comes back."""

import asyncio
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2
import obedient
import psutil
import torch
from serving import PNG, numbered, png

from clipdit.fake_backend import FakeBackend
from clipdit.images import read_image
from clipdit.translator import Translator

KEY = "a-key-of-a-test"

ALONE = Translator(FakeBackend())


def is_right(number: int, data: bytes) -> None:
    """An answer is bit for bit what one image alone gets in one process: a swapped one would be another's."""
    wanted = ALONE.translate_image(numbered(number), seed=number)
    assert torch.equal(read_image(data), wanted), f"the answer to {number} is another one's"


@functools.cache
def picture(number: int) -> bytes:
    """What is sent: a PNG."""
    return png(numbered(number))


class RayService:
    """A service in processes of its own. It is ready when this returns.

    Args:
        folder: where its model looks for orders.
    """

    def __init__(self, folder: Path, *words: str):
        self.folder = folder
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  a pipe that nobody reads would block it
        path = os.pathsep.join([str(Path(obedient.__file__).parent), os.environ.get("PYTHONPATH", "")])
        began = time.monotonic()
        self.process = subprocess.Popen(
            [
                sys.executable,
                obedient.__file__,
                folder,
                "serve",
                "--engine",
                "ray",
                "--backend",
                "fake",
                "--port",
                "0",
                "--json",
                *words,
            ],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CLIPDIT_API_KEY": KEY, "TMPDIR": "/tmp"},
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        assert self.line, self.log()
        self.start_s = time.monotonic() - began
        self.url = json.loads(self.line)["url"]

    def processes(self, name: str = "") -> list[psutil.Process]:
        """Of the service, those whose command line holds this."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # it has just ended
                continue
        return found

    @property
    def models(self) -> list[psutil.Process]:
        return self.processes("ServeReplica:clipdit:Model")

    @property
    def ingresses(self) -> list[psutil.Process]:
        return self.processes("ServeReplica:clipdit:Ingress")

    @contextmanager
    def order(self, name: str, text: str = ""):
        """The model obeys it within the block."""
        (self.folder / name).write_text(text)
        try:
            yield
        finally:
            (self.folder / name).unlink()

    @property
    def batches(self) -> list[int]:
        """Images of each batch so far, of all replicas that ever were."""
        return [int(line) for file in self.folder.glob("batches-*") for line in file.read_text().split()]

    def client(self, **more) -> httpx2.AsyncClient:
        headers = {"authorization": f"Bearer {KEY}"}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        return httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=90, limits=limits, **more)

    async def wait(self, replicas: int, *, within_s: float) -> float:
        """Until so many replicas are ready; how long that took, seconds."""
        began = time.monotonic()
        async with self.client() as client, asyncio.timeout(within_s):
            while True:
                try:
                    answer = await client.get("/readyz?verbose")
                    if answer.status_code == 200 and answer.json()["replicas_ready"] == replicas:
                        return time.monotonic() - began
                except httpx2.TransportError:
                    pass
                await asyncio.sleep(0.05)

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def stop(self) -> None:
        """By force what does not end when it is told to."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        left = [*self.processes(), self.process] if self.process.poll() is None else []
        for process in left:
            try:
                process.kill()
            except (psutil.Error, ProcessLookupError):
                continue
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


class Outcomes:
    """What became of requests: each is in exactly one of its lists."""

    def __init__(self) -> None:
        self.codes: Counter[tuple[int, str | None]] = Counter()
        self.broken: list[str] = []
        self.took_s: list[float] = []

    async def ask(self, client: httpx2.AsyncClient, number: int, check: Callable[[int, bytes], None] | None = None) -> int:
        """The status; 0 for a connection that broke."""
        began = time.monotonic()
        try:
            answer = await client.post(f"/v1/translate?seed={number}", content=picture(number), headers=PNG)
        except httpx2.TransportError as error:
            self.broken.append(repr(error))
            return 0
        self.took_s.append(time.monotonic() - began)
        self.codes[answer.status_code, answer.headers.get("x-clipdit-error")] += 1
        if answer.status_code == 200 and check is not None:
            check(number, answer.content)
        if answer.status_code in (429, 503):
            assert int(answer.headers["retry-after"]) >= 1
        if answer.status_code != 200:
            assert answer.json()["error"]["code"] == answer.headers["x-clipdit-error"]
        return answer.status_code

    @property
    def statuses(self) -> set[int]:
        return {status for status, _ in self.codes}


async def keep_asking(service: RayService, outcomes: Outcomes, stop: asyncio.Event, callers: int, check=None) -> None:
    """Callers who ask again when they have their answers, until told to stop."""
    numbers = iter(range(10**9))

    async def caller(client: httpx2.AsyncClient) -> None:
        while not stop.is_set():
            await outcomes.ask(client, next(numbers) % 2**20 + 1, check)

    async with service.client() as client:
        await asyncio.gather(*(caller(client) for _ in range(callers)))


def sockets_of(processes: Sequence[psutil.Process]) -> list[tuple[str, int, str]]:
    """(address, port, process) of everything that listens."""
    found = []
    for process in processes:
        try:
            listening = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            found += [(c.laddr.ip, c.laddr.port, process.name()) for c in listening]
        except psutil.Error:
            continue
    return found
