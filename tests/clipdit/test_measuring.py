"""Timing: medians with their spread, and rivals that take turns."""

import time

import pytest
import torch

from clipdit.measuring import Spread, time_calls_ms

CPU = torch.device("cpu")


def test_a_spread_is_the_median_between_its_percentiles():
    assert Spread.of(map(float, range(101))) == Spread(median=50.0, low=10.0, high=90.0, p95=95.0, count=101)
    assert Spread.of([3.0]) == Spread(median=3.0, low=3.0, high=3.0, p95=3.0, count=1)
    with pytest.raises(ValueError, match="no measurements"):
        Spread.of([])


def test_calls_take_turns_and_the_warm_up_is_not_counted():
    order = []
    first, second = time_calls_ms([lambda: order.append("a"), lambda: order.append("b")], CPU, warm_up=2, at_least=3, seconds=0.0)
    assert order == ["a", "b"] * 5
    assert first.count == second.count == 3


def test_times_are_milliseconds():
    (spread,) = time_calls_ms([lambda: time.sleep(0.02)], CPU, warm_up=0, at_least=3, seconds=0.0)
    assert 20 <= spread.low <= spread.median <= spread.high < 2000


def test_timing_goes_on_until_the_time_is_up():
    (spread,) = time_calls_ms([lambda: time.sleep(0.01)], CPU, at_least=1, seconds=0.2)
    assert 2 <= spread.count <= 20
