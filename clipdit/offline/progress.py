"""How far a job is: counted as records reach the ledger, told to whoever runs the job, and written to progress.json for whoever
looks on from outside.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from clipdit.offline.folder import JobFolder, Record

logger = logging.getLogger(__name__)

WRITE_INTERVAL_S = 1.0
"""Between two writings of progress.json, seconds."""

MAX_REASONS = 100
"""Reasons counted one by one; reasons with a file's own numbers in them could be as many as files."""

OTHER_REASONS = "(other reasons: see ledger.jsonl)"

State = Literal["running", "done", "failed", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is, in inputs."""

    total: int
    finished: int
    """Written or quarantined, earlier runs included."""
    quarantined: int


class Tally:
    """Brings records to the ledger and counts them.

    Args:
        folder: opened.
        engine: its name, for progress.json.
        total: inputs of the job. `kept`: those whose records are in the ledger already.
        on_progress: called at the start and with every batch of records.
    """

    def __init__(self, folder: JobFolder, *, engine: str, total: int, kept: int, on_progress: Callable[[Progress], None] | None):
        self.folder, self.engine, self.total, self.kept, self.on_progress = folder, engine, total, kept, on_progress
        self.finished, self.quarantined = kept, 0
        self.reasons: Counter[str] = Counter()
        self.started = _now()
        self._start_s = self._written_s = time.monotonic()  # rates must not follow a clock that is set
        self._complained = False
        self._tell("running")

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start_s

    def add(self, records: list[Record]) -> None:
        """Records whose images are in place. OSError when the ledger cannot be written; then none of them counts."""
        self.folder.append(records)
        self.finished += len(records)
        for record in records:
            if record.status == "quarantined":
                self.quarantined += 1
                reason = record.reason or ""
                known = reason in self.reasons or len(self.reasons) < MAX_REASONS
                self.reasons[reason if known else OTHER_REASONS] += 1
        self._tell("running", every_s=WRITE_INTERVAL_S)

    def end(self, state: State) -> None:
        """The last word of this run."""
        self._write(state)

    def _tell(self, state: State, *, every_s: float = 0.0) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(total=self.total, finished=self.finished, quarantined=self.quarantined))
        if time.monotonic() - self._written_s >= every_s:
            self._write(state)

    def _write(self, state: State) -> None:
        self._written_s = time.monotonic()
        made = self.finished - self.kept
        report = {
            "state": state,
            "engine": self.engine,
            "total": self.total,
            "finished": self.finished,
            "kept": self.kept,
            "written": made - self.quarantined,
            "quarantined": self.quarantined,
            "images_per_s": round(made / self.seconds, 3) if made else 0.0,
            "started": self.started,
            "updated": _now(),
            "reasons": dict(self.reasons.most_common()),
        }
        try:
            self.folder.write_progress(report)
        except OSError as error:  # the images and the ledger matter; they will say themselves if they cannot be written either
            if not self._complained:
                logger.warning("progress.json cannot be written: %s", error.strerror or error)
            self._complained = True


def _now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
