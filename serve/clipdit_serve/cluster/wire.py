"""What travels between an ingress and a model: plain values, so that it can be read wherever it arrives.

Images are NumPy arrays, which Ray hands over without copying; what arrives is read-only. Errors are values, too: an exception
that Ray carries is wrapped in one of its own, and `ApiError` would not survive that.
"""

from dataclasses import dataclass

import numpy as np
import torch

from clipdit.backend import SamplingDefaults
from clipdit_serve.engine import Answer, BatchReport, Health, ModelInfo, Task
from clipdit_serve.errors import ApiError


@dataclass(frozen=True, kw_only=True, eq=False)
class SentTask:
    """A `Task` on its way to a model."""

    image: np.ndarray
    seed: int
    steps: int | None
    guidance: float | None

    @classmethod
    def of(cls, task: Task) -> "SentTask":
        return cls(image=task.image.numpy(), seed=task.seed, steps=task.steps, guidance=task.guidance)

    def task(self) -> Task:
        return Task(image=torch.from_numpy(self.image.copy()), seed=self.seed, steps=self.steps, guidance=self.guidance)


@dataclass(frozen=True, kw_only=True, eq=False)
class SentAnswer:
    """An `Answer` on its way back."""

    image: np.ndarray
    sampling: SamplingDefaults
    fingerprint: str
    model_s: float
    batch: int

    @classmethod
    def of(cls, answer: Answer) -> "SentAnswer":
        # a copy: an image of a batch would travel with all the others of it
        image = answer.image.numpy().copy()
        return cls(
            image=image,
            sampling=answer.sampling,
            fingerprint=answer.fingerprint,
            model_s=answer.model_s,
            batch=answer.batch,
        )

    def answer(self, elapsed_s: float) -> Answer:
        """elapsed_s: since the ingress sent its task; what the model did not take of it counts as waiting."""
        return Answer(
            image=torch.from_numpy(self.image.copy()),
            sampling=self.sampling,
            fingerprint=self.fingerprint,
            queue_s=max(0.0, elapsed_s - self.model_s),
            model_s=self.model_s,
            batch=self.batch,
        )


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An `ApiError` on its way back."""

    code: str
    message: str
    param: str | None
    retry_after_s: int | None

    @classmethod
    def of(cls, error: ApiError) -> "Refusal":
        return cls(code=error.code, message=error.message, param=error.param, retry_after_s=error.retry_after_s)

    def error(self) -> ApiError:
        return ApiError(self.code, self.message, param=self.param, retry_after_s=self.retry_after_s)


@dataclass(frozen=True, kw_only=True)
class Started:
    """An image is in the model."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """How a model replica is."""

    health: Health
    model: ModelInfo
    replica: str
    """Which one this is."""
    reports: tuple[tuple[int, BatchReport], ...]
    """Of batches, numbered from 1: those that nobody was told of yet, and those that this asker was told of and did not say to
    have. Each has one asker."""
