"""The seam between the routes and what runs the model: in this process (batching.py), or elsewhere.

An engine answers translations of fitted images, one at a time as callers see it, in batches as the model sees it. It says whether
it can, and how long one must wait where it cannot. Whatever goes wrong is an `ApiError`.
"""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from jaxtyping import UInt8
from torch import Tensor

from clipdit.backend import Limits, SamplingDefaults

State = Literal["ready", "loading", "draining", "hung", "dead"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One image to be translated."""

    image: UInt8[Tensor, "3 H W"]
    """Fitted: of a size that the backend takes."""
    seed: int
    """0 to 2**63 - 1."""
    steps: int | None = None
    """Solver steps; None is the model's default, as for guidance."""
    guidance: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """A translated image, and where its time went."""

    image: UInt8[Tensor, "3 H W"]
    """Fitted, as the task's."""
    sampling: SamplingDefaults
    """With which steps, guidance and solver."""
    fingerprint: str
    """Of the weights that made it: `engine.model` may be another by the time it is read."""
    queue_s: float
    """From the task's arrival to the start of its batch."""
    model_s: float
    """Of its batch."""
    batch: int
    """Images in its batch, this one included and padding not."""


class Ticket(Protocol):
    """One image in the queue of an engine, or in its model."""

    @property
    def place(self) -> int | None:
        """In the queue, in order of arrival; 1 is the oldest. None when it does not wait any more. An image may be overtaken by
        those that fit a batch with an older one."""
        ...

    async def answer(self) -> Answer:
        """ApiError where there is none. When the awaiting task is cancelled, the image leaves."""
        ...

    def leave(self) -> None:
        """Out of the queue, if it is not in the model yet: it never gets there."""
        ...


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """What an engine tells of each batch; metrics are made from it."""

    images: int
    """Without padding."""
    seconds: float
    waits_s: tuple[float, ...]
    """How long each image waited."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What is served."""

    backend: str
    precision: str
    """The dtype's name."""
    fingerprint: str
    """Same weights and configuration, same fingerprint."""
    limits: Limits
    defaults: SamplingDefaults


@dataclass(frozen=True, kw_only=True)
class Health:
    """Whether an engine answers, and what is going on in it."""

    state: State
    said: str
    """One line; what to do where it is not ready."""
    waiting: int = 0
    """Requests that wait for a batch."""
    running: int = 0
    """Images in the model."""
    details: dict[str, float | int | str] = field(default_factory=dict)
    """For people who look closer."""


class Engine(Protocol):
    """Called by the thread of the event loop, except where it says otherwise."""

    @property
    def model(self) -> ModelInfo | None:
        """The one that serves; None until the first is loaded."""
        ...

    def start(self, on_batch: Callable[[BatchReport], None]) -> None:
        """Begin to load and warm up; returns at once. `on_batch` is called from any thread."""
        ...

    def health(self) -> Health:
        """Answered from memory, at once."""
        ...

    def admit(self) -> AbstractContextManager[None]:
        """Around everything done for one request, decoding included, so that work which cannot be answered in time is refused
        before it costs anything. ApiError (queue_full, loading, draining, model_unavailable) on entry."""
        ...

    def submit(self, task: Task, on_start: Callable[[], None]) -> Ticket:
        """Into the queue, within `admit`. `on_start` is called from any thread, once, when the image gets into the model.
        ApiError when there is no queue any more."""
        ...

    async def translate(self, task: Task) -> Answer:
        """`submit`, and the answer. When the awaiting task is cancelled, an image that is not in the model yet never gets
        there."""
        ...

    def reload(self) -> Future[ModelInfo]:
        """Open the model anew, load and warm it beside the one that serves, and put it in its place between two batches; returns
        at once. The future holds the new model when every later batch is its own; or the exception, one line, for which the old
        one goes on as if nothing had been asked: a ValueError or OSError for what was found where the model lies. One reload at a
        time. It must take every image that was fitted to the old one's limits (`clipdit_serve.reloading.check_limits`): those
        that are decoded by then are answered by it."""
        ...

    @property
    def idle(self) -> bool:
        """Whether nobody who was admitted waits for an answer."""
        ...

    def drain(self) -> None:
        """Admit nobody from now on; who was admitted is answered."""
        ...

    def close(self) -> None:
        """Stop, and release the model. Whoever still waits gets `draining`."""
        ...
