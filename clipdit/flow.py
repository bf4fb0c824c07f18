"""Flow matching between noise and target. t = 0 is noise, t = 1 is the target (Lipman et al. 2023, eq. 20-22 with sigma_min = 0).

The path is a straight line, x_t = (1 - t) noise + t target; the network learns its velocity, target - noise, whose mean given
x_t carries noise to targets (Liu et al. 2023; for transformers on latents Ma et al. 2024, "SiT").
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from clipdit.objective import Noised, check_scheduler, per_image, settings
from clipdit.sampling import FLOW_SOLVERS, FlowSolver, SamplingTable, flow_table, shift_time
from clipdit.shapes import Latent, Time


def sample_times(
    batch: int,
    generator: torch.Generator,
    *,
    distribution: Literal["logit_normal", "uniform"] = "logit_normal",
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
) -> Time:
    """Training times in [0, 1], (batch,), float32, on the generator's device.

    logit_normal: sigmoid(mean + std z), which visits the middle of the path more often (Esser et al. 2024, sec. 3.1). mean > 0
    moves it towards the target (theirs has t = 1 at the noise, so their mean has the other sign). shift > 1 then moves times
    towards the noise (see `shift_time`).
    """
    if distribution == "uniform":
        t = torch.rand(batch, generator=generator, device=generator.device)
    elif distribution == "logit_normal":
        t = torch.sigmoid(mean + std * torch.randn(batch, generator=generator, device=generator.device))
    else:
        raise ValueError(f"distribution of times is {distribution!r}; wanted logit_normal or uniform")
    return shift_time(t, shift)


def interpolate(noise: Latent, target: Latent, t: Time) -> Latent:
    """x_t = (1 - t) noise + t target."""
    t = per_image(t, noise)
    return (1 - t) * noise + t * target


def velocity_target(noise: Latent, target: Latent) -> Latent:
    """dx_t / dt = target - noise, the same at every t."""
    return target - noise


def estimate_target(x: Latent, t: Time, velocity: Latent) -> Latent:
    """Where the straight line from (x, t) along `velocity` is at t = 1."""
    return x + per_image(1 - t, x) * velocity


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """The network predicts velocity; see clipdit.objective.Objective."""

    times: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of training times."""
    mean: float = 0.0
    """Of the logit-normal, in logits; > 0 trains more near the target."""
    std: float = 1.0
    """Of the logit-normal, in logits; > 0."""
    train_shift: float = 1.0
    """Shift of training times; > 1 trains more near the noise (large images), 1 is none."""
    at_noise: float = 0.1
    """Share of the training times that are 0, the noise itself. Sampling begins there, and times drawn as above hardly come near
    it: without such a share the first step may be a guess, and few steps are made of little else (docs/choices.md)."""
    shift: float = 1.0
    """Shift of sampling times; > 1 takes more of the steps near the noise, 1 spaces them equally. Travels in the checkpoint."""
    solver: FlowSolver = "euler"
    """The sampler when none is named. Travels in the checkpoint."""

    solvers: ClassVar[tuple[str, ...]] = FLOW_SOLVERS

    def __post_init__(self) -> None:
        if not 0 <= self.at_noise <= 1:
            raise ValueError(f"at_noise is {self.at_noise}; wanted a share in [0, 1]")
        if not math.isfinite(self.mean):
            raise ValueError(f"mean is {self.mean}; wanted a finite number")
        for name in ("std", "train_shift", "shift"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted a finite number above 0")
        if self.times not in ("logit_normal", "uniform"):
            raise ValueError(f"times is {self.times!r}; wanted logit_normal or uniform")
        if self.solver not in self.solvers:
            raise ValueError(f"solver is {self.solver!r}; a flow matching model takes {', '.join(self.solvers)}")

    def sample_times(self, batch: int, generator: torch.Generator) -> Time:
        t = sample_times(batch, generator, distribution=self.times, mean=self.mean, std=self.std, shift=self.train_shift)
        if not self.at_noise:
            return t
        there = torch.rand(batch, generator=generator, device=generator.device) < self.at_noise
        return torch.where(there, 0.0, t)

    def noised(self, target: Latent, noise: Latent, t: Time) -> Noised:
        target = target.to(noise.dtype)
        return Noised(
            x=interpolate(noise, target, t),
            t=t,
            noise=noise,
            prediction_target=velocity_target(noise, target),
            weight=torch.ones_like(t),
        )

    def estimate_target(self, x: Latent, t: Time, prediction: Latent) -> Latent:
        return estimate_target(x, t, prediction)

    def signal_level(self, t: Time) -> Time:
        return t

    def table(self, steps: int, solver: str | None = None) -> SamplingTable:
        return flow_table(steps, solver or self.solver, shift=self.shift)

    def to_scheduler(self) -> SchedulerMixin:
        """The diffusers scheduler of this solver and shift. To step with it: its velocity is noise - target, minus ours;
        its sigma is 1 - t; give its Euler the sigmas 1 - i / steps, since its default ones waste a step."""
        if self.solver == "heun":
            return FlowMatchHeunDiscreteScheduler(shift=self.shift)
        if self.solver == "dpmpp_2m":
            return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=self.shift)
        return FlowMatchEulerDiscreteScheduler(shift=self.shift)

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin) -> "FlowMatching":
        """The objective whose `to_scheduler` this is. ValueError for a scheduler, or a setting, that `table` does not follow."""
        config = settings(scheduler)
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            objective = cls(solver="euler", shift=config["shift"])
        elif isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
            objective = cls(solver="heun", shift=config["shift"])
        elif isinstance(scheduler, DPMSolverMultistepScheduler):
            objective = cls(solver="dpmpp_2m", shift=config["flow_shift"])
        else:
            raise ValueError(f"scheduler is {type(scheduler).__name__}; flow matching takes FlowMatchEulerDiscreteScheduler")
        check_scheduler(scheduler, objective.to_scheduler())
        return objective
