"""Calls that take turns, and what a replay is. On a CPU the calls themselves stand in for a graph."""

import time

import pytest
import torch

from clipdit_kernels.benchmark import timing
from clipdit_kernels.benchmark.timing import in_turns_us, record, sets_for

CPU = torch.device("cpu")


def test_so_many_sets_that_no_call_finds_its_own_in_a_cache():
    assert sets_for(2**20) == 128
    assert sets_for(2**27 - 1) == 2
    assert sets_for(2**30) == sets_for(2**27) == 1
    assert sets_for(0) == 2**27  # nothing is divided by zero


def test_a_replay_does_every_call_in_turn_and_writes_the_first_ones_output():
    done = []

    def call(i: int):
        def run():
            done.append(i)
            return (torch.full((4,), float(len(done))),)

        return run

    recorded = record([call(0), call(1), call(2)], CPU)
    assert recorded.count == timing.AT_LEAST
    done.clear()
    recorded.outputs[0].zero_()
    recorded.replay()
    assert done == [i % 3 for i in range(timing.AT_LEAST)]
    assert recorded.outputs[0].tolist() == [1.0] * 4


def test_calls_with_much_output_are_fewer_in_a_graph(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "HELD", 4 * 1000 * 4)
    assert record([lambda: (torch.zeros(1000),)], CPU).count == 4
    assert record([lambda: (torch.zeros(100_000),)], CPU).count == 1


def test_times_are_of_one_call_and_tell_slow_from_fast():
    def sleeping(seconds: float):
        def call():
            time.sleep(seconds)
            return (torch.zeros(1),)

        return record([call], CPU)

    times = in_turns_us({"fast": sleeping(0.0005), "slow": sleeping(0.002)}, CPU, seconds=0.01, at_least=3)
    assert times["slow"].count == times["fast"].count >= 3
    assert times["fast"].low >= 500 and times["slow"].low >= 2000
    assert times["slow"].median > 2 * times["fast"].median
