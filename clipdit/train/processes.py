"""The processes of a run: one, or as many as `torchrun` starts. The first one reads, writes and speaks; all must agree.

A failure of the first process alone would leave the others waiting for it. So what it does alone it does inside `on_main`, after
which all processes know how it went.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long processes wait for one another: the first may cache a large data set meanwhile. torchrun notices one that died."""


class FirstProcessFailed(ValueError):
    """On the other processes; the first one says why."""

    def __init__(self) -> None:
        super().__init__("the first process stopped; its message says why")


def processes() -> PartialState:
    """This process among all. The first call joins the others; on a machine without CUDA they work on the CPU."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def agreed(*values: float) -> list[float]:
    """The mean of each value over the processes, so that all act alike. One process need not talk to itself."""
    state = processes()
    if state.num_processes == 1:
        return list(values)
    mean = reduce(torch.tensor(values, device=state.device), "mean")
    assert isinstance(mean, torch.Tensor)
    return mean.tolist()


def on_main(work: Callable[[], T]) -> T | None:
    """`work` on the first process, while the others wait. If it raises there, all raise. The others get None."""
    error, result = None, None
    if processes().is_main_process:
        try:
            result = work()
        except Exception as caught:  # whatever it is, the others must hear of it before it goes on its way
            error = caught
    (failed,) = agreed(float(error is not None))
    if error is not None:
        raise error
    if failed:
        raise FirstProcessFailed
    return result


def from_main(work: Callable[[], T]) -> T:
    """The result of `work` on the first process, on all."""
    results = [on_main(work)]
    if processes().num_processes > 1:
        broadcast_object_list(results)
    return results[0]  # type: ignore[return-value]  (filled by now)


def main_first(work: Callable[[], T]) -> T:
    """`work` on the first process, then on the others, which find it done: a cache."""
    result = on_main(work)
    return result if processes().is_main_process else work()  # type: ignore[return-value]  (on_main returned it here)
