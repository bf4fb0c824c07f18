"""The seam between a job and what runs it: this process (run.py), or what an installed package brings.

A job plans, resumes, keeps the ledger and tells progress; an engine turns inputs into written images and hands back a record of
each. So every engine has the same plan, the same seeds, the same files and the same ledger, and one can go on where another was
stopped.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol, runtime_checkable

from clipdit.backend import Limits, SamplingDefaults
from clipdit.offline.folder import Record
from clipdit.offline.plan import Item
from clipdit.offline.steps import Work
from clipdit.translator import Sampling, Translator

GROUP = "clipdit.offline_engines"
"""Entry points of other engines than "local": each an `EngineClass`."""

Finished = Callable[[list[Record]], None]
"""Takes records whose images are in place, writes them to the ledger, and may raise OSError when that cannot be."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a job needs to know of a model, wherever it is loaded."""

    backend: str
    fingerprint: str
    limits: Limits
    sampling: SamplingDefaults
    """Of the job, defaults filled in."""


@runtime_checkable
class Engine(Protocol):
    """Runs the inputs of one job after the other."""

    name: str
    """What `--engine` calls it."""

    def describe(self, sampling: Sampling) -> Model:
        """The model. ValueError when it cannot be sampled so, or cannot be opened."""
        ...

    def run(self, items: Iterable[Item], work: Work, finished: Finished) -> int:
        """Finish every item, each in one record, and return the batch size it came to. `finished` is called by this thread.

        OSError when outputs cannot be written; what is finished was handed over before. ValueError when it cannot go on."""
        ...


@runtime_checkable
class EngineClass(Protocol):
    """What stands behind an entry point of `GROUP`."""

    def __call__(
        self, model: str | None, *, backend: str | None, device: str | None, replicas: int | None
    ) -> AbstractContextManager[Engine]:
        """An engine with the model that `Translator.open` would open with these words, in `replicas` copies; None leaves their
        number to the engine. ValueError for what it cannot do."""
        ...


def model_of(translator: Translator, sampling: Sampling) -> Model:
    """What an open translator says of itself."""
    return Model(
        backend=translator.backend.name,
        fingerprint=translator.backend.fingerprint,
        limits=translator.backend.limits,
        sampling=translator.settings(**sampling),
    )


def engine_class(name: str) -> EngineClass:
    """The engine behind a name. ValueError for one that is unknown, or whose package is not installed."""
    entries = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in entries:
        raise ValueError(f"there is no engine {name}; there are {', '.join(['local', *sorted(entries)])}")
    try:
        return entries[name].load()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the {name} engine needs the Python package {error.name}, which is not installed; install clipdit[{name}]"
        ) from error
