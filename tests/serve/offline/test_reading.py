"""Inputs are decoded in a process that can be killed: whatever a decoder does costs one input and nothing else."""

import os
import signal
import sys

import psutil
import pytest
import wild_decoders
from job_pictures import draw

from clipdit.fake_backend import FakeBackend
from clipdit.offline import Item, JobFolder
from clipdit.offline.steps import Work, read
from clipdit_serve.offline import reading


@pytest.fixture
def work(tmp_path):
    limits = FakeBackend(native_size=(32, 32)).limits
    return Work(folder=JobFolder(tmp_path / "out"), limits=limits, size=None, fit="pad", sampling={}, batch_size=4, workers=1)


@pytest.fixture
def items(tmp_path):
    for i in range(4):
        draw(tmp_path / f"{i}.png", seed=i)
    return [Item(id=str(i), source=str(tmp_path / f"{i}.png"), output=f"{i}.png", seed=i) for i in range(4)]


@pytest.fixture(scope="module", autouse=True)
def pool():
    yield
    reading._pool().stop()
    reading._pool().join()
    reading._pool.cache_clear()


def test_pixels_are_those_that_are_read_here(items, work):
    for item, (state, pixels) in zip(items, reading.read_all(items, work), strict=True):
        expected = read(item, work)
        assert pixels == expected.image.numpy().tobytes() and state["shape"] == [3, 32, 32]
        assert state["item"]["seed"] == item.seed


@pytest.mark.parametrize(
    ("misdeed", "reason"),
    [(wild_decoders.crash, "the decoder crashed on it"), (wild_decoders.hang, "was not read within 1.5 s")],
)
def test_a_decoder_that_crashes_or_hangs_costs_its_own_input(items, work, monkeypatch, misdeed, reason):
    work_on = reading._read
    monkeypatch.setattr(reading, "TIMEOUT_S", 1.5)
    wild = [reading._schedule(item, work) for item in items[:1]]
    assert wild[0][1].result()[1] is not None
    monkeypatch.setattr(reading, "_read", misdeed)
    pool, future = reading._schedule(items[1], work)
    monkeypatch.setattr(reading, "_read", work_on)
    state, pixels = reading._result(items[1], work, pool, future, again=True)
    assert pixels is None and state["record"]["status"] == "quarantined" and reason in state["record"]["reason"]
    assert [pixels is None for _, pixels in reading.read_all(items, work)] == [False] * 4


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process how much address space it has")
def test_an_image_that_needs_more_memory_than_allowed_is_quarantined(items, work, monkeypatch):
    monkeypatch.setattr(reading, "MEMORY_BYTES", 64 * 2**20)
    reading._pool.cache_clear()
    draw(items_path := work.folder.path.parent / "large.png", 6000, 6000)
    large = Item(id="large", source=str(items_path), output="large.png", seed=0)
    (state, pixels), *others = reading.read_all([large, *items], work)
    assert pixels is None and "memory" in state["record"]["reason"]
    assert all(pixels is not None for _, pixels in others)


def test_a_process_that_is_killed_from_outside_is_replaced(items, work):
    reading.read_all(items, work)
    for process in psutil.Process().children(recursive=True):
        if "forkserver" in " ".join(process.cmdline()):
            for child in process.children():
                os.kill(child.pid, signal.SIGKILL)
    assert [pixels is None for _, pixels in reading.read_all(items, work)] == [False] * 4
