"""What a network is trained to predict, behind one small set of questions, so that the training loop never asks which one it is.

`clipdit.flow.FlowMatching` (velocity), `clipdit.diffusion.DDPM` (noise) and `clipdit.direct.Direct` (the image) are the answers.
Each knows how to disturb a target, what the network should say about it, how to read a clean target out of what it said, and
which tables sample from it. Network time t is 0 at the noise and 1 at the target for all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from clipdit.sampling import SamplingTable
from clipdit.shapes import Latent, Time


@dataclass(frozen=True, kw_only=True)
class Noised:
    """A batch of targets, each disturbed to its own time."""

    x: Latent
    """What the network sees."""
    t: Time
    """Network time, float32."""
    noise: Latent
    prediction_target: Latent
    """What the network should say at (x, t)."""
    weight: Float[Tensor, "B"]
    """Factor of each image's squared error."""


@runtime_checkable
class Objective(Protocol):
    """Frozen dataclasses; `target`, `noise` and predictions are (B, C, h, w), times (B,)."""

    solvers: ClassVar[tuple[str, ...]]
    """The solvers `table` knows."""

    @property
    def solver(self) -> str:
        """The solver of `table` when none is named."""
        ...

    def sample_times(self, batch: int, generator: torch.Generator) -> Time:
        """`batch` training times, on the generator's device."""
        ...

    def noised(self, target: Latent, noise: Latent, t: Time) -> Noised:
        """The targets at the given times with the given noise: pure, no randomness."""
        ...

    def estimate_target(self, x: Latent, t: Time, prediction: Latent) -> Latent:
        """The clean target that the prediction implies: what pixel losses decode. Errors in it grow towards t = 0."""
        ...

    def signal_level(self, t: Time) -> Time:
        """alpha / (alpha + sigma) where x = alpha target + sigma noise: rises with t in [0, 1], and means the same
        signal-to-noise ratio for every objective. Flow matching: t itself."""
        ...

    def table(self, steps: int, solver: str | None = None) -> SamplingTable:
        """Coefficients of `steps` sampling steps. ValueError for an unknown solver or impossible number of steps."""
        ...

    def to_scheduler(self) -> SchedulerMixin:
        """The diffusers scheduler that a checkpoint folder carries; says everything `table` needs."""
        ...


def draw_noise(target: Latent, generator: torch.Generator) -> Latent:
    """Gaussian noise like `target`, at least float32, drawn on the generator's device."""
    dtype = torch.promote_types(target.dtype, torch.float32)
    return torch.randn(target.shape, generator=generator, device=generator.device, dtype=dtype).to(target.device)


def draw_noised(objective: Objective, target: Latent, generator: torch.Generator) -> Noised:
    """The targets at times, and with noise, drawn from the generator (of any device) in this order."""
    t = objective.sample_times(len(target), generator).to(target.device)
    return objective.noised(target, draw_noise(target, generator), t)


def per_image(values: Float[Tensor, "B"], like: Latent) -> Tensor:
    """(B,) -> (B, 1, 1, 1) in the dtype of `like`."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def settings(scheduler: SchedulerMixin) -> Mapping[str, Any]:
    """What diffusers saves of a scheduler. Every scheduler is also a ConfigMixin, which its type does not say."""
    return cast(ConfigMixin, scheduler).config


def check_scheduler(given: SchedulerMixin, ours: SchedulerMixin) -> None:
    """ValueError naming the first setting in which `given` would sample differently from `ours`."""
    for name, wanted in settings(ours).items():
        got = settings(given).get(name)
        if not name.startswith("_") and got != wanted:
            raise ValueError(
                f"{type(given).__name__} has {name} = {got!r}; clipdit samples with {wanted!r}. Correct scheduler_config.json"
            )


def objective_from(scheduler: SchedulerMixin) -> Objective:
    """The objective a checkpoint's scheduler stands for. What matters in training only (distribution of times, weights) is not in
    a scheduler and takes its default. ValueError if clipdit cannot sample as this scheduler does."""
    from clipdit.diffusion import DDPM  # here, not above: all are built on this file
    from clipdit.direct import Direct
    from clipdit.flow import FlowMatching

    if "Flow" in type(scheduler).__name__ or settings(scheduler).get("use_flow_sigmas"):
        return FlowMatching.from_scheduler(scheduler)
    if settings(scheduler).get("prediction_type") == "sample":
        return Direct.from_scheduler(scheduler)
    return DDPM.from_scheduler(scheduler)
