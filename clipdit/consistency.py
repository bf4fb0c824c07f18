"""Consistency models: from any point of the path straight to its end, so that one evaluation makes an image (Song et al. 2023).

A student learns it from a flow matching teacher (`clipdit.train.student`). Its prediction is the chord, (end - x) / (1 - t),
which at the end of the path is the teacher's velocity; so a student begins as its teacher. More steps than one go back: the end
found so far is noised to the next time, and its end is asked for again.
"""

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from clipdit.flow import estimate_target, interpolate, velocity_target
from clipdit.objective import Noised, check_scheduler, settings
from clipdit.sampling import Row, SamplingTable, shift_time
from clipdit.shapes import Latent, Time

SOLVER = "consistency"


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """The network predicts the chord to the end of the path; see clipdit.objective.Objective."""

    intervals: int = 20
    """Steps in which the teacher's path is cut for training; a point is to have the same end as the next one."""
    shift: float = 1.0
    """Shift of sampling times; > 1 noises more between steps. Travels in the checkpoint."""

    solvers: ClassVar[tuple[str, ...]] = (SOLVER,)

    def __post_init__(self) -> None:
        if self.intervals < 2:
            raise ValueError(f"intervals is {self.intervals}; wanted at least 2")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}; wanted a finite number above 0")

    @property
    def solver(self) -> str:
        return SOLVER

    def sample_times(self, batch: int, generator: torch.Generator) -> Time:
        """Beginnings of intervals: 0, 1 / intervals, ... 1 - 1 / intervals."""
        return torch.randint(self.intervals, (batch,), generator=generator, device=generator.device) / self.intervals

    def noised(self, target: Latent, noise: Latent, t: Time) -> Noised:
        """`prediction_target` is the chord to this one target; a teacher knows better where the path ends. `weight` makes the
        squared error one of the end, not of the chord."""
        target = target.to(noise.dtype)
        return Noised(
            x=interpolate(noise, target, t),
            t=t,
            noise=noise,
            prediction_target=velocity_target(noise, target),
            weight=(1 - t).square(),
        )

    def estimate_target(self, x: Latent, t: Time, prediction: Latent) -> Latent:
        return estimate_target(x, t, prediction)

    def signal_level(self, t: Time) -> Time:
        return torch.ones_like(t)  # from anywhere the estimate is to be an image

    def table(self, steps: int, solver: str | None = None) -> SamplingTable:
        """`steps` equal steps from t = 0 to t = 1, shifted: x <- t' end + (1 - t') noise, the last one x <- end. (Multistep
        consistency sampling, Song et al. 2023, alg. 1, on the straight path.) ValueError for fewer than one, or a solver."""
        if (solver or SOLVER) != SOLVER:
            raise ValueError(f"solver is {solver!r}; a consistency model takes {SOLVER}")
        if steps < 1:
            raise ValueError(f"sampling steps is {steps}; wanted at least 1")
        grid = [shift_time(i / steps, self.shift) for i in range(steps)] + [1.0]
        rows = (Row(time=now, a=then, b=then * (1 - now), d=1 - then) for now, then in itertools.pairwise(grid))
        return SamplingTable(solver=SOLVER, steps=steps, rows=tuple(rows), guidable=False)

    def to_scheduler(self) -> SchedulerMixin:
        """As `FlowMatching.to_scheduler`: its velocity is minus ours, its sigma 1 - t; give it the sigmas 1 - i / steps."""
        return FlowMatchLCMScheduler(shift=self.shift)

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin) -> "Consistency":
        """The objective whose `to_scheduler` this is. ValueError for a scheduler, or a setting, that `table` does not follow."""
        if not isinstance(scheduler, FlowMatchLCMScheduler):
            raise ValueError(f"scheduler is {type(scheduler).__name__}; a consistency model takes FlowMatchLCMScheduler")
        objective = cls(shift=settings(scheduler)["shift"])
        check_scheduler(scheduler, objective.to_scheduler())
        return objective
