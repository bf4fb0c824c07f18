"""DDPM: the network predicts the noise in a target disturbed to one of T steps (Ho et al. 2020). The paper's recipe.

Step n of 0 ... T - 1 has x = sqrt(ac_n) target + sqrt(1 - ac_n) noise, with ac = cumulative product of 1 - beta: n = 0 is almost
the target, n = T - 1 almost noise. The network is told time like everywhere in clipdit, 0 at the noise and 1 at the target:

    t = (T - 1 - n) / T        n = T - 1 -> t = 0,   n = 0 -> t = 1 - 1 / T,   t = 1 would be the target itself

which float32 carries back to the same n exactly for T up to 10,000 (`step_of_time` rounds).
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from jaxtyping import Float, Int
from torch import Tensor

from clipdit.objective import Noised, check_scheduler, per_image, settings
from clipdit.sampling import DDPM_SOLVERS, LOWEST_HALF_LOG_SNR, DDPMSolver, SamplingTable, ddpm_table
from clipdit.shapes import Latent, Time

Schedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
"""Noise schedules, by diffusers' names: Ho et al. 2020; latent diffusion; cosine (Nichol & Dhariwal 2021)."""


def alphas_cumprod(schedule: Schedule, timesteps: int, beta_start: float, beta_end: float) -> Float[Tensor, "T"]:
    """Share of the target's variance left after step n, float64, falling. The cosine schedule ignores the betas.

    float64, since 1 - ac near n = 0 is 1e-4: in float32, as diffusers has it, that difference is right to three digits only.
    """
    if schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64) ** 2
    elif schedule == "squaredcos_cap_v2":
        levels = [math.cos((i / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(timesteps + 1)]
        betas = [min(1 - then / now, 0.999) for now, then in itertools.pairwise(levels)]
        betas = torch.tensor(betas, dtype=torch.float64)
    else:
        raise ValueError(f"noise schedule is {schedule!r}; wanted linear, scaled_linear or squaredcos_cap_v2")
    return torch.cumprod(1 - betas, dim=0)


def time_of_step(n: Int[Tensor, "B"], timesteps: int) -> Time:
    """Step 0 ... T - 1 -> network time (T - 1 - n) / T, float32."""
    return (timesteps - 1 - n).float() / timesteps


def step_of_time(t: Time, timesteps: int) -> Int[Tensor, "B"]:
    """The nearest step to a network time; the inverse of `time_of_step`. t = 1 is step 0."""
    return (timesteps - 1 - (t.float() * timesteps).round().long()).clamp(min=0, max=timesteps - 1)


@dataclass(frozen=True, kw_only=True)
class DDPM:
    """The network predicts noise; see clipdit.objective.Objective."""

    timesteps: int = 1000
    """T, the number of noise levels; 2 to 10,000."""
    schedule: Schedule = "linear"
    """How the noise grows from step to step."""
    beta_start: float = 1e-4
    """Variance added at step 0, (0, 1). The cosine schedule ignores it."""
    beta_end: float = 0.02
    """Variance added at step T - 1, (0, 1). The cosine schedule ignores it."""
    min_snr_gamma: float | None = None
    """Weight squared errors by min(SNR, gamma) / SNR (Hang et al. 2023; theirs is 5). None: all steps alike, as in Ho et al."""
    solver: DDPMSolver = "ddim"
    """The sampler when none is named. Travels in the checkpoint."""

    solvers: ClassVar[tuple[str, ...]] = DDPM_SOLVERS

    def __post_init__(self) -> None:
        if not 2 <= self.timesteps <= 10_000:
            raise ValueError(f"timesteps is {self.timesteps}; wanted 2 to 10000")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"betas run from {self.beta_start} to {self.beta_end}; wanted 0 < beta_start <= beta_end < 1")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma is {self.min_snr_gamma}; wanted a number above 0, or None")
        if self.schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
            raise ValueError(f"schedule is {self.schedule!r}; wanted linear, scaled_linear or squaredcos_cap_v2")
        if self.solver not in self.solvers:
            raise ValueError(f"solver is {self.solver!r}; a DDPM model takes {', '.join(self.solvers)}")

    @cached_property
    def alphas_cumprod(self) -> Float[Tensor, "T"]:
        """float64, on the CPU."""
        return alphas_cumprod(self.schedule, self.timesteps, self.beta_start, self.beta_end)

    def levels(self, n: Int[Tensor, "B"], dtype: torch.dtype = torch.float32) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """alpha = sqrt(ac_n) and sigma = sqrt(1 - ac_n), on the device of n."""
        # roots in float64, then the cast, then the move: some devices have no float64
        alpha, sigma = self.alphas_cumprod.sqrt().to(dtype), (1 - self.alphas_cumprod).sqrt().to(dtype)
        return alpha.to(n.device)[n], sigma.to(n.device)[n]

    def add_noise(self, target: Latent, noise: Latent, n: Int[Tensor, "B"]) -> Latent:
        """x at step n: alpha target + sigma noise."""
        alpha, sigma = self.levels(n, noise.dtype)
        return per_image(alpha, noise) * target + per_image(sigma, noise) * noise

    def sample_times(self, batch: int, generator: torch.Generator) -> Time:
        n = torch.randint(self.timesteps, (batch,), generator=generator, device=generator.device)
        return time_of_step(n, self.timesteps)

    def noised(self, target: Latent, noise: Latent, t: Time) -> Noised:
        n = step_of_time(t, self.timesteps)
        return Noised(
            x=self.add_noise(target.to(noise.dtype), noise, n),
            t=t,
            noise=noise,
            prediction_target=noise,
            weight=self.weight(n),
        )

    def weight(self, n: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Factor of the squared error at step n: 1, or min(SNR, gamma) / SNR with SNR = ac / (1 - ac)."""
        if self.min_snr_gamma is None:
            return torch.ones(n.shape, device=n.device)
        alpha, sigma = self.levels(n)
        return (self.min_snr_gamma * (sigma / alpha) ** 2).clamp(max=1)

    def estimate_target(self, x: Latent, t: Time, prediction: Latent) -> Latent:
        alpha, sigma = self.levels(step_of_time(t, self.timesteps), x.dtype)
        return (x - per_image(sigma, x) * prediction) / per_image(alpha, x)

    def signal_level(self, t: Time) -> Time:
        alpha, sigma = self.levels(step_of_time(t, self.timesteps))
        return alpha / (alpha + sigma)

    def table(self, steps: int, solver: str | None = None) -> SamplingTable:
        return ddpm_table(self.alphas_cumprod, steps, solver or self.solver)

    def to_scheduler(self) -> SchedulerMixin:
        shared = {
            "num_train_timesteps": self.timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": self.schedule,
            "timestep_spacing": "trailing",
        }
        if self.solver == "dpmpp_2m":
            return DPMSolverMultistepScheduler(**shared, lambda_min_clipped=LOWEST_HALF_LOG_SNR)
        kind = DDPMScheduler if self.solver == "ddpm" else DDIMScheduler
        return kind(**shared, clip_sample=False)  # clipping to [-1, 1] is for pixels

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin) -> "DDPM":
        """The objective whose `to_scheduler` this is. ValueError for a scheduler, or a setting, that `table` does not follow."""
        kinds: dict[type, DDPMSolver] = {DDIMScheduler: "ddim", DDPMScheduler: "ddpm", DPMSolverMultistepScheduler: "dpmpp_2m"}
        if type(scheduler) not in kinds:
            raise ValueError(f"scheduler is {type(scheduler).__name__}; DDPM takes {', '.join(k.__name__ for k in kinds)}")
        config = settings(scheduler)
        objective = cls(
            timesteps=config["num_train_timesteps"],
            schedule=config["beta_schedule"],
            beta_start=config["beta_start"],
            beta_end=config["beta_end"],
            solver=kinds[type(scheduler)],
        )
        check_scheduler(scheduler, objective.to_scheduler())
        return objective
