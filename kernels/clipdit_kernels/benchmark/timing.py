"""Calls timed against one another: each as a CUDA graph of many calls, replayed in turns.

A kernel of some microseconds cannot be timed by events around its launch, which takes longer; a graph of many can. Inputs and
outputs of the calls in a graph are different memory, more than the caches hold, so every call reads and writes the GPU's memory.
Elsewhere than on a GPU the calls themselves take turns; that is for tests.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipdit.measuring import Spread

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]

COLD = 2**27
"""Bytes that the calls of a graph read and write together, at least: about twice the largest cache of today's GPUs."""
HELD = 2**32
"""Bytes of output that a graph keeps, at most (or those of one call)."""
AT_LEAST = 32
"""Calls in a graph, unless their outputs are larger than HELD."""


@dataclass(frozen=True)
class Recorded:
    """Calls that can be done again together."""

    replay: Callable[[], None]
    outputs: Outputs
    """Of the first call; written by every replay."""
    count: int
    """Calls in a replay."""


def sets_for(bytes_of_a_call: int) -> int:
    """How many sets of inputs make a call find none of its own in a cache."""
    return max(1, -(-COLD // max(1, bytes_of_a_call)))


def record(calls: Sequence[Call], device: torch.device) -> Recorded:
    """`calls`, one for each set of inputs, as one replay; more than once each if they are few."""
    first = calls[0]()  # compiles and tunes what has to be
    size = sum(tensor.numel() * tensor.element_size() for tensor in first)
    count = max(1, min(max(len(calls), AT_LEAST), HELD // max(1, size)))
    chosen = [calls[i % len(calls)] for i in range(count)]
    if device.type != "cuda":

        def again() -> None:
            made = [call() for call in chosen]
            for kept, new in zip(first, made[0], strict=True):
                kept.copy_(new)

        return Recorded(replay=again, outputs=first, count=count)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what libraries set up at their first calls cannot be captured
        for call in calls[:3]:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in chosen]  # all kept until the end, so that no two share memory
    return Recorded(replay=graph.replay, outputs=outputs[0], count=count)


def in_turns_us(
    rivals: Mapping[str, Recorded], device: torch.device, *, seconds: float = 0.5, at_least: int = 10
) -> dict[str, Spread]:
    """Microseconds of one call of each. Rounds go on for `seconds` together, and for `at_least` of them."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for recorded in rivals.values():
        recorded.replay()
    began = time.perf_counter()
    rounds = 0
    while rounds < at_least or time.perf_counter() - began < seconds:
        for name, us in _round_us(rivals, device).items():
            times[name].append(us / rivals[name].count)
        rounds += 1
    return {name: Spread.of(values) for name, values in times.items()}


def _round_us(rivals: Mapping[str, Recorded], device: torch.device) -> dict[str, float]:
    """One replay of each."""
    if device.type != "cuda":
        times = {}
        for name, recorded in rivals.items():
            start = time.perf_counter()
            recorded.replay()
            times[name] = 1e6 * (time.perf_counter() - start)
        return times
    events = {name: (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for name in rivals}
    for name, recorded in rivals.items():
        events[name][0].record()
        recorded.replay()
        events[name][1].record()
    torch.cuda.synchronize(device)
    return {name: 1000 * start.elapsed_time(end) for name, (start, end) in events.items()}
