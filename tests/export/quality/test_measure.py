"""Variants are timed side by side, and where memory does not allow that, each beside the reference."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clipdit.measuring import Spread
from clipdit_export.bundle import open_bundle
from clipdit_export.manifest import REFERENCE
from clipdit_export.quality import measure
from clipdit_export.quality.measure import measure_speed

SOURCES = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
NAMES = [REFERENCE, "onnx-fp16", "onnx-int8"]


@pytest.fixture
def rounds(monkeypatch) -> list[int]:
    """How many were timed together, each time. The reference takes 10 ms, then 20 when the machine is busy; the others half."""
    found: list[int] = []

    def time_calls_ms(calls: list[Callable[[], object]], *_, **__) -> list[Spread]:
        found.append(len(calls))
        for call in calls:
            call()
        pace = 10.0 * len(found)
        return [Spread.of([pace if i == 0 else pace / 2]) for i in range(len(calls))]

    monkeypatch.setattr(measure, "time_calls_ms", time_calls_ms)
    return found


def test_all_take_turns_where_they_fit_into_memory(bundle: Path, rounds: list[int]):
    speed = measure_speed(open_bundle(bundle), NAMES, SOURCES, seconds=0.1)
    assert rounds == [3] and {name: one.per_image_ms for name, one in speed.items()} == {
        REFERENCE: 10.0, "onnx-fp16": 5.0, "onnx-int8": 5.0
    }  # fmt: skip


def test_each_takes_turns_with_the_reference_where_they_do_not(bundle: Path, rounds: list[int], monkeypatch, caplog):
    monkeypatch.setattr(measure.psutil.Process, "memory_info", _growing())
    with caplog.at_level("INFO", logger="clipdit_export"):
        speed = measure_speed(open_bundle(bundle), NAMES, SOURCES, seconds=0.1)
    assert rounds == [2, 2] and "they are timed one by one" in caplog.text
    # half of the reference in both pairs: the busy moment of the second does not count against what was timed in it
    assert {name: one.per_image_ms for name, one in speed.items()} == {REFERENCE: 10.0, "onnx-fp16": 5.0, "onnx-int8": 5.0}


def _growing() -> Callable:
    """Of a process whose memory grows by a terabyte from call to call."""
    sizes = iter(range(1, 100))
    return lambda _: type("Memory", (), {"rss": next(sizes) * 2**40})()
