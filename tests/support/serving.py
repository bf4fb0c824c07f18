"""What tests of the service share: an application in this process with a client, models that do as told, numbered images."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import httpx2
import numpy as np
import torch

from clipdit.backend import Limits
from clipdit.fake_backend import FakeBackend
from clipdit.images import Fit, encode_image
from clipdit.translator import Size, Translator
from clipdit_serve.app import create_app
from clipdit_serve.batching import InProcessEngine, Model
from clipdit_serve.decoding import DecodePool, Upload
from clipdit_serve.settings import ServeSettings
from clipdit_serve.variants import Variants

CLIPDIT = Path(sys.executable).with_name("clipdit")

SIDE = 64
"""Of the models' and the numbered images, pixels."""

BITS = 24
"""Of a number in an image."""


class Identity(Translator):
    """Answers each image with itself, and writes down its batches.

    Args:
        before: called with the images of each batch but those of the warm-up; may wait, or raise.
        fingerprint: None is the fake backend's.
    """

    def __init__(
        self,
        *,
        max_batch: int | None = None,
        before: Callable[[torch.Tensor], None] = lambda images: None,
        fingerprint: str | None = None,
    ):
        super().__init__(FakeBackend(native_size=(SIDE, SIDE), max_batch=max_batch))
        self.backend.fingerprint = fingerprint or self.backend.fingerprint
        self.before = before
        self.batches: list[int] = []
        """Images of each, padding included."""
        self.kinds: list[tuple] = []
        """Their shape, steps and guidance."""

    def __call__(self, source_u8: torch.Tensor, *, seeds: Sequence[int], **sampling) -> torch.Tensor:
        if source_u8.any():  # the warm-up's are black
            self.batches.append(len(source_u8))
            self.kinds.append((tuple(source_u8.shape[1:]), sampling["steps"], sampling["guidance"]))
            self.before(source_u8)
        return source_u8.clone()


class Gate:
    """A model waits here until it is opened: `Identity(before=Gate())`."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, images: torch.Tensor) -> None:
        self.reached.set()
        assert self.opened.wait(60), "nobody opened the gate"


class Shared:
    """A pool of decoding processes that several applications use, one after the other; none of them closes it."""

    def __init__(self, pool: DecodePool):
        self.pool, self.ready = pool, True

    async def start(self) -> None: ...

    def close(self) -> None: ...

    async def decode(self, data: bytes, limits: Limits, size: Size, fit: Fit) -> Upload:
        return await self.pool.decode(data, limits, size, fit)


@contextlib.asynccontextmanager
async def served_variants(
    models: dict[str, Callable[[], Model]], settings: ServeSettings, decoder, *, wait: bool = True
) -> AsyncIterator[tuple[httpx2.AsyncClient, Variants]]:
    """As `served`, of several variants by name."""
    variants = Variants({name: InProcessEngine(open_model, settings) for name, open_model in models.items()})
    async with _client_of(variants, settings, decoder) as client:
        if wait:
            await until(lambda: variants.health().state == "ready")
        yield client, variants


@contextlib.asynccontextmanager
async def served(
    model: Model | Callable[[], Model], settings: ServeSettings, decoder, *, wait: bool = True, **more
) -> AsyncIterator[tuple[httpx2.AsyncClient, InProcessEngine]]:
    """A client of an application, without a network between them. wait: until it is ready. more: for `create_app`."""
    engine = InProcessEngine(model if not isinstance(model, Translator) else lambda: model, settings)
    async with _client_of(engine, settings, decoder, **more) as client:
        if wait:
            await until(lambda: engine.health().state == "ready")
        yield client, engine


@contextlib.asynccontextmanager
async def _client_of(
    engine: InProcessEngine | Variants, settings: ServeSettings, decoder, **more
) -> AsyncIterator[httpx2.AsyncClient]:
    app = create_app(engine, decoder, settings, **more)
    limits = httpx2.Limits(max_connections=None)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app, raise_app_exceptions=False), base_url="http://test", limits=limits, timeout=60
        ) as client,
    ):
        yield client


async def until(condition: Callable[[], bool], *, within_s: float = 10.0) -> None:
    """Wait for something that another thread does."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


def numbered(number: int) -> torch.Tensor:
    """uint8 (3, SIDE, SIDE): the number as black and white bars, first bit on the left, with its complement below."""
    bits = (number >> np.arange(BITS)) & 1
    row = np.repeat(bits, 2)
    row = np.concatenate([row, np.ones(SIDE - len(row), int)])  # never all black
    half = np.broadcast_to(row, (SIDE // 2, SIDE))
    image = np.concatenate([half, 1 - half]) * 255
    return torch.from_numpy(np.broadcast_to(image.astype(np.uint8), (3, SIDE, SIDE)).copy())


def number_of(image: torch.Tensor) -> int:
    """The number of an image of `numbered`; assertion error for any other image."""
    row = image[0, 0, : 2 * BITS : 2] // 255
    number = int((row.long() << torch.arange(BITS)).sum())
    assert torch.equal(image, numbered(number)), "the image is none of `numbered`"
    return number


def png(image: torch.Tensor) -> bytes:
    return encode_image(image)


PNG = {"content-type": "image/png"}
"""Headers of a body that is a PNG."""


class Running:
    """A service in a process of its own."""

    def __init__(self, *words: str, backend: str = "fake", environment: dict[str, str] | None = None):
        self._log = tempfile.NamedTemporaryFile("w")  # noqa: SIM115  (closed with the service; a pipe that nobody reads would block it)
        self.process = subprocess.Popen(
            [CLIPDIT, "serve", "--backend", backend, "--port", "0", "--json", *words],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        assert self.line, self.stop()
        self.url = json.loads(self.line)["url"]

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def stop(self) -> list[dict]:
        """Its log."""
        # Before it is killed: Python's tracker of resources then complains, in words and not in JSON. And through a file of our
        # own: with the one that all write to, they would write where we read.
        lines = Path(self._log.name).read_text(encoding="utf-8").splitlines(keepends=True)
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        for number, line in enumerate(lines):
            try:
                json.loads(line)
            except ValueError:
                around = "".join(lines[max(0, number - 1) : number + 3])
                raise AssertionError(f"line {number} of the log is no JSON:\n{around}") from None
        return list(map(json.loads, lines))
