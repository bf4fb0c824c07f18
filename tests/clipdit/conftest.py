"""For tests that train: pairs and networks small enough to train in a second, and processes that may be killed."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipdit.data.augment import Augment
from clipdit.experiment import ModelSettings, PairSettings, TranslationExperiment
from clipdit.images import write_image
from clipdit.testing import tiny_checkpoint
from clipdit.train.loop import TrainSettings

PATIENCE_S = 240
"""For one process; a busy machine is slow."""
TIMES = ("images_per_s", "loading_share")
"""Columns of the history in which two equal runs differ."""


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pairs to train on and 3 held out, side by side, 32 x 32 each: four coloured fields, and the same colours turned round.
    Read only."""
    folder = tmp_path_factory.mktemp("pairs")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("val", 3)):
        for i in range(count):
            source = (torch.rand(3, 2, 2, generator=generator) * 255).to(torch.uint8)
            both = torch.cat((source, source.flip(-1)), dim=-1).repeat_interleave(16, 1).repeat_interleave(16, 2)
            write_image(folder / split / f"{i}.png", both)
    return folder


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of tiny random networks, to take VAE and CLIP from. Read only."""
    return tiny_checkpoint(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def tiny_experiment(parts: Path) -> Callable[..., TranslationExperiment]:
    """`tiny_experiment(train={...}, model={...}, drop_condition=...)`: a translation that trains in a second, with changes."""

    def make(train: dict | None = None, model: dict | None = None, **changes) -> TranslationExperiment:
        base = TranslationExperiment(
            vae=str(parts),
            clip=str(parts),
            pairs=PairSettings(size=32, augment=Augment(views=2)),
            model=ModelSettings(width=32, depth=2, heads=2),
            train=TrainSettings(
                steps=6, batch_size=4, warmup_steps=2, precision="fp32", log_every=1, save_every=3, sheet_every=1000
            ),
            steps=2,
        )
        return replace(base, train=replace(base.train, **train or {}), model=replace(base.model, **model or {}), **changes)

    return make


@pytest.fixture(scope="session")
def tiny_words(pairs_folder: Path, parts: Path) -> Callable[..., list[str]]:
    """`tiny_words(out, "--train.steps", 9)`: the command line that trains a tiny translation."""

    def words(out: Path, *more: object) -> list[str]:
        settings = {
            "vae": parts, "clip": parts, "steps": 2, "pairs.size": 32, "pairs.augment.views": 2,
            "model.width": 32, "model.depth": 2, "model.heads": 2,
            "train.steps": 10, "train.batch-size": 4, "train.warmup-steps": 2, "train.precision": "fp32",
            "train.log-every": 1, "train.save-every": 4, "train.sheet-every": 1000,
        }  # fmt: skip
        options = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        return ["train", "edges2emoji", "--data", str(pairs_folder), "--out", str(out), *options, *map(str, more)]

    return words


class Training:
    """A process that trains."""

    def __init__(self, process: multiprocessing.process.BaseProcess, log: Path):
        self._process, self._log = process, log

    @property
    def output(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def send(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self) -> int:
        """Its exit code; minus the number of the signal that ended it. One that does not end in PATIENCE_S is a failure."""
        self._process.join(PATIENCE_S)
        if self._process.exitcode is None:
            self._process.kill()
            pytest.fail(f"still running after {PATIENCE_S} s; it said: {self.output}")
        return self._process.exitcode

    def wait_for(self, seen: Callable[[], bool]) -> None:
        """Until something is seen, which must be before the process ends."""
        end = time.monotonic() + PATIENCE_S
        while not seen():
            assert self._process.is_alive(), f"ended with {self._process.exitcode}; it said: {self.output}"
            assert time.monotonic() < end, self.output
            time.sleep(0.002)


@pytest.fixture(scope="session")
def _forkserver():
    context = multiprocessing.get_context("forkserver")  # imports once; its forks start at once, and have no threads of ours
    context.set_forkserver_preload(["clipdit.train.runs", "clipdit.commands.train", "torch.distributed", "matplotlib.figure"])
    return context


@pytest.fixture(scope="session")
def start_training(_forkserver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Training]]:
    """`start_training(words, before="...", rank=0, world=2, port=...)` starts a command line in a process of its own."""
    logs, started = tmp_path_factory.mktemp("processes"), []
    script = str(Path(__file__).with_name("training_process.py"))

    def start(words: list[str], *, before: str = "", rank: int = 0, world: int = 1, port: int = 0) -> Training:
        environment = {}
        if world > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        log = logs / f"{len(started)}.log"
        told = {"LOG": str(log), "ENVIRONMENT": environment, "BEFORE": before, "WORDS": words}
        process = _forkserver.Process(target=runpy.run_path, args=(script, told))
        process.start()
        started.append(process)
        return Training(process, log)

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


@pytest.fixture(scope="session")
def start_ranks(start_training) -> Callable[..., list[Training]]:
    """`start_ranks(2, words, before="...")`: so many processes that train together, as torchrun starts them."""

    def start(world: int, words: list[str], **options) -> list[Training]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [start_training(words, rank=rank, world=world, port=port, **options) for rank in range(world)]

    return start


@pytest.fixture(scope="session")
def whole_run(tiny_words, start_training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of `tiny_words`, which nobody interrupted. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    training = start_training(tiny_words(folder))
    assert training.wait() == 0, training.output
    return folder


@pytest.fixture(scope="session")
def history() -> Callable[[Path], list[dict[str, float]]]:
    """The rows of a run's history, without the columns that depend on the clock."""

    def read(folder: Path) -> list[dict[str, float]]:
        rows = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
        return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]

    return read


@pytest.fixture(scope="session")
def same_bits() -> Callable[[Path, Path], bool]:
    """Whether two safetensors files hold the same names with bitwise the same values."""

    def compare(a: Path, b: Path) -> bool:
        one, other = load_file(a), load_file(b)
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    return compare
