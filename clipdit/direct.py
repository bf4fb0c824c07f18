"""Models that make the image itself, in one evaluation: the generators of Pix2Pix and Pix2PixHD, students of a single step.

There is no path to follow: the network is asked once, at the noise (t = 0), and what it says is the target.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from clipdit.objective import Noised, check_scheduler
from clipdit.sampling import Row, SamplingTable
from clipdit.shapes import Latent, Time

SOLVER = "direct"


@dataclass(frozen=True, kw_only=True)
class Direct:
    """The network predicts the target from the noise; see clipdit.objective.Objective."""

    solvers: ClassVar[tuple[str, ...]] = (SOLVER,)

    @property
    def solver(self) -> str:
        return SOLVER

    def sample_times(self, batch: int, generator: torch.Generator) -> Time:
        return torch.zeros(batch, device=generator.device)

    def noised(self, target: Latent, noise: Latent, t: Time) -> Noised:
        return Noised(x=noise, t=t, noise=noise, prediction_target=target.to(noise.dtype), weight=torch.ones_like(t))

    def estimate_target(self, x: Latent, t: Time, prediction: Latent) -> Latent:
        return prediction

    def signal_level(self, t: Time) -> Time:
        return torch.ones_like(t)  # the estimate is an image, although x is all noise

    def table(self, steps: int, solver: str | None = None) -> SamplingTable:
        """x <- f. ValueError for more steps than one."""
        if (solver or SOLVER) != SOLVER:
            raise ValueError(f"solver is {solver!r}; this model makes its image in one step and takes {SOLVER}")
        if steps != 1:
            raise ValueError(f"{steps} sampling steps asked; this model makes its image in one. Use 1")
        return SamplingTable(solver=SOLVER, steps=1, rows=(Row(time=0.0, a=0.0, b=1.0),))

    def to_scheduler(self) -> SchedulerMixin:
        """DDIM of one training step that predicts the sample, which is what this is."""
        return DDIMScheduler(num_train_timesteps=1, prediction_type="sample", timestep_spacing="trailing", clip_sample=False)

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin) -> "Direct":
        """ValueError unless it is what `to_scheduler` makes."""
        if not isinstance(scheduler, DDIMScheduler):
            raise ValueError(f"scheduler is {type(scheduler).__name__}; a model of one step takes DDIMScheduler")
        check_scheduler(scheduler, cls().to_scheduler())
        return cls()
