import time

import pytest

from clipdit_serve.pace import REMEMBERED, Pace, whole_seconds


def ran(pace: Pace, seconds: float, cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pace.begin(cost)
    monkeypatch.setattr(time, "monotonic", lambda: now + seconds)
    assert pace.end() == pytest.approx(seconds)


def test_the_mean_is_of_the_last_batches(monkeypatch: pytest.MonkeyPatch):
    pace = Pace(hang_s=1)
    assert pace.batch_s is None and pace.wait_s(7) == 0
    ran(pace, 50, 1, monkeypatch)
    for _ in range(REMEMBERED):
        ran(pace, 2, 1, monkeypatch)
    assert pace.batch_s == pytest.approx(2)
    assert pace.wait_s(7) == pytest.approx(14)


def test_a_batch_hangs_after_ten_times_what_its_cost_took_before(monkeypatch: pytest.MonkeyPatch):
    pace = Pace(hang_s=1)
    ran(pace, 2, 10, monkeypatch)
    now = time.monotonic()
    pace.begin(100)  # should take 20 s
    for after_s, late_s in [(199, 0), (203, 3)]:
        monkeypatch.setattr(time, "monotonic", lambda: now + after_s)  # noqa: B023  (called within the loop)
        assert pace.hangs_for_s() == pytest.approx(late_s)
    pace.end()
    assert pace.hangs_for_s() == 0


def test_where_nothing_is_known_a_batch_hangs_after_the_time_that_was_set(monkeypatch: pytest.MonkeyPatch):
    pace, now = Pace(hang_s=3), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pace.begin(1)
    monkeypatch.setattr(time, "monotonic", lambda: now + 2.9)
    assert pace.hangs_for_s() == 0
    monkeypatch.setattr(time, "monotonic", lambda: now + 4)
    assert pace.hangs_for_s() == pytest.approx(1)
    pace.abandon()
    assert pace.hangs_for_s() == 0 and pace.batch_s is None


@pytest.mark.parametrize(("seconds", "wanted"), [(0, 1), (0.2, 1), (1, 1), (1.01, 2), (59.5, 60)])
def test_retry_after_is_rounded_up(seconds: float, wanted: int):
    assert whole_seconds(seconds) == wanted
