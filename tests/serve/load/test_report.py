"""The table and the plot of a load test."""

import io

import pytest
from PIL import Image

from clipdit_serve.load import report


def level(rate: float, **more) -> dict:
    times = {"p50": 20.0 * rate, "p95": 30.0 * rate, "p99": 40.0 * rate}
    usual = {
        "offered_per_s": rate, "seconds": 10.0, "sent": int(10 * rate), "answered": int(10 * rate), "refused": 0, "failed": 0,
        "hung": 0, "answered_per_s": rate, "answered_ms": times, "refused_ms": None,
        "late_ms": {"p50": 0.1, "p95": 0.2, "p99": 0.3}, "said": {"200 image/png": int(10 * rate)}, "steady": True,
    }  # fmt: skip
    return usual | more


OVERLOADED = level(
    80, answered=500, refused=290, failed=6, hung=4, answered_per_s=50.0, refused_ms={"p50": 2.0, "p95": 3.0, "p99": 4.5},
    said={"200 image/png": 500, "429 queue_full": 290, "ServerDisconnectedError": 6, "no answer within 90 s": 4}, steady=False,
)  # fmt: skip


def record(*levels: dict, capacity: bool = True) -> dict:
    return {
        "provenance": {"hardware": {"cpu": "a processor", "cores": 2, "gpus": []}},
        "service": {
            "url": "http://127.0.0.1:8000",
            "model": "edges@1234",
            "backend": "eager",
            "precision": "float32",
            "started": [],
        },
        "capacity": {"per_s": 41.5, "answered": 400, "callers": 16} if capacity else None,
        "levels": list(levels),
    }


def test_the_table_has_a_line_for_each_rate_with_its_counts_and_percentiles():
    lines = report.table(record(level(10), OVERLOADED)).splitlines()
    assert lines[1].split() == "10 10 100 100 0 0 0 200 300 400 - - -".split()
    assert lines[2].split() == "80 50 800 500 290 6 4 1600 2400 3200* 2 3 4.5".split()
    assert len({len(line) for line in lines[:3]}) == 1


def test_what_went_wrong_is_said_below_the_table():
    notes = report.notes(record(level(10), OVERLOADED))
    assert notes[0].startswith("* not settled")
    assert notes[1:] == ["6 times: ServerDisconnectedError", "4 times: no answer within 90 s"]
    assert report.notes(record(level(10))) == []


def test_a_machine_too_slow_to_ask_in_time_is_said():
    (note,) = report.notes(record(level(10, late_ms={"p50": 1.0, "p95": 9.0, "p99": 150.0})))
    assert note.startswith("requests were sent 150 ms late (p99) at 10/s: this machine is too busy")


def test_a_machine_that_changed_meanwhile_is_said():
    made = record(level(10))
    made["capacity"]["again_per_s"] = 40.0
    assert report.notes(made) == []
    made["capacity"]["again_per_s"] = 20.0
    (note,) = report.notes(made)
    assert note.startswith("not comparable: the closed loop gets 20 answers a second after the rates, 41.5 before.")


def test_the_heading_says_what_was_asked():
    assert report.heading(record()).splitlines() == [
        "edges@1234 (eager, float32) at http://127.0.0.1:8000",
        "16 callers in a closed loop get 41.5 answers a second",
    ]


@pytest.mark.parametrize(
    "made",
    [
        record(level(10), level(30), OVERLOADED),
        record(level(10), capacity=False),
        record(level(10, answered=0, answered_ms=None, failed=100, said={"ServerDisconnectedError": 100})),
    ],
    ids=["usual", "one rate", "no answers"],
)
def test_there_is_a_plot_whatever_was_measured(made: dict):
    with Image.open(io.BytesIO(report.plot(made))) as picture:
        assert picture.format == "PNG" and picture.size > (900, 700)
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20
