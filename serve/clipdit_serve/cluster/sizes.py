"""How many replicas there are, and how many requests each may hold: every bound follows from `queue` and `max_batch`."""

from dataclasses import dataclass

from clipdit_serve.settings import ServeSettings

OTHERS = 1024
"""Requests of one ingress that wait for nothing from a model: health, refusals, slow uploads, events of jobs."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the service as a whole, checked when made."""

    models: int = 1
    """Replicas that hold a model."""
    ingresses: int = 1
    """Replicas that answer HTTP."""
    cpus: float = 1
    """Of each model, as Ray counts them; its threads are as many."""
    gpus: float = 0
    """Of each model."""

    def __post_init__(self) -> None:
        for name, option in (("models", "--replicas"), ("ingresses", "--ingress-replicas")):
            if getattr(self, name) < 1:
                raise ValueError(f"{option} is {getattr(self, name)}; wanted 1 or more")

    def admitted(self, settings: ServeSettings) -> int:
        """Requests that one ingress admits at the same time: its share of the queue and of the batches that run."""
        return -(-(settings.queue + settings.max_batch * self.models) // self.ingresses)

    def model_ongoing(self, settings: ServeSettings) -> int:
        """Of one model replica: it may be the last one left, and then holds what all ingresses admitted."""
        return self.admitted(settings) * self.ingresses

    def ingress_ongoing(self, settings: ServeSettings) -> int:
        """Of one ingress."""
        return self.admitted(settings) + settings.max_jobs + OTHERS


def check_jobs(sizes: Sizes, settings: ServeSettings) -> None:
    """ValueError where a job would be asked for at an ingress that does not have it."""
    if settings.max_jobs and sizes.ingresses > 1:
        raise ValueError(
            f"--ingress-replicas {sizes.ingresses} cannot keep jobs: they live in the memory of one ingress, and the next "
            "request may meet another. Say --max-jobs 0, or use one ingress"
        )
