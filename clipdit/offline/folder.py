"""The output folder of a job: what was planned, what is finished, and how both survive a kill at any moment.

Images are written under a temporary name and renamed when complete. The ledger gets a batch's lines in one write, followed by
fsync, after its images are in place. So a kill loses at most the lines of the batches in flight: those images are made again,
the same to the last byte. After a power cut an image may be damaged although the ledger names it; its hash tells, and a resume
makes it again.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from filelock import FileLock, Timeout

from clipdit.offline.plan import WORK_FOLDER, Item

FORMAT = 1
"""Of the three files; a job of another number is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line of the ledger: what became of one input."""

    id: str
    input: str
    """Path or URL of the source file."""
    output: str | None
    """Path relative to the output folder; None when quarantined."""
    status: Literal["written", "quarantined"]
    reason: str | None
    """Why it is quarantined, one line; None when written."""
    sha256: str | None
    """Of the written file; None when quarantined."""
    seed: int
    notes: Sequence[str] = ()
    """What had to be converted on the way in."""
    ms: float
    """Milliseconds spent on this input: reading, its share of the batch, writing."""


class JobFolder:
    """The files of one job. `open` it before anything is written to it."""

    def __init__(self, path: Path):
        self.path = path
        self.work = path / WORK_FOLDER
        self._job, self._plan, self._ledger = path / "job.json", path / "plan.jsonl", path / "ledger.jsonl"
        self._progress = path / "progress.json"

    @property
    def exists(self) -> bool:
        """Whether the folder holds a job."""
        return self._job.is_file()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder if need be and keep other processes out; on entry throw away what a killed run left incomplete.

        ValueError when another process works on it."""
        self.work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.work / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another process is writing to {self.path}; wait for it, or choose another output folder") from None
        try:
            self.clear_leftovers()
            yield
        finally:
            lock.release()

    def clear_leftovers(self) -> None:
        """Remove what killed processes left incomplete. A process that still writes such a file fails and leaves no output."""
        for left in self.work.glob("*.part"):
            left.unlink(missing_ok=True)

    def read_job(self) -> dict:
        """The settings of the job. ValueError when there is no job here, or one that cannot be read."""
        try:
            job = json.loads(self._job.read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{self.path} holds no job of `clipdit translate`: there is no job.json in it") from None
        except ValueError as error:
            raise ValueError(f"{self._job} is damaged: {error}") from error
        if not isinstance(job, dict) or job.get("format") != FORMAT:
            raise ValueError(f"{self._job} is not of format {FORMAT}; it was made by another version of clipdit")
        return job

    def write_job(self, job: dict) -> None:
        """Replace job.json. Written after the plan, so that a folder with a job.json has a whole plan."""
        self.write_file(self._job, json.dumps({"format": FORMAT} | job, indent=2).encode(), durable=True)

    def read_plan(self) -> Iterator[Item]:
        """The planned inputs, one by one. ValueError when the file is missing or damaged."""
        try:
            with self._plan.open(encoding="ascii") as stream:
                for line in stream:
                    yield Item(**json.loads(line))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{self._plan} cannot be read: {error}. Start again in another output folder") from error

    def write_plan(self, items: Iterable[Item]) -> None:
        """Replace plan.jsonl."""
        self._replace(self._plan, (to_line(item) for item in items))

    def read_ledger(self) -> Iterator[tuple[Record, int]]:
        """(record, position in bytes of its line's end), one by one, up to the first line that cannot be read.

        A kill or a full disk can leave a last line cut short."""
        if not self._ledger.exists():
            return
        position = 0
        with self._ledger.open("rb") as stream:
            for line in stream:
                try:
                    record = Record(**json.loads(line))
                except (ValueError, TypeError):
                    return
                if not line.endswith(b"\n"):
                    return
                position += len(line)
                yield record, position

    @property
    def ledger_bytes(self) -> int:
        """Length of the ledger."""
        return self._ledger.stat().st_size if self._ledger.exists() else 0

    def write_ledger(self, records: Iterable[Record]) -> None:
        """Replace the ledger: at a resume, without the lines of what is to be done again."""
        self._replace(self._ledger, (to_line(record) for record in records))

    def append(self, records: Iterable[Record]) -> None:
        """Add lines to the ledger and bring them to the disk; all of them or, if there is no space, none."""
        data = "".join(map(to_line, records)).encode()
        with self._ledger.open("ab", buffering=0) as stream:
            before = stream.tell()
            try:
                written = stream.write(data)
                while written < len(data):  # a nearly full disk takes a part, and says so at the next write
                    written += stream.write(data[written:])
                os.fsync(stream.fileno())
            except BaseException:  # an interrupt, too: half a line must not stay
                stream.truncate(before)
                raise

    def write_progress(self, report: dict) -> None:
        """Replace progress.json."""
        self.write_file(self._progress, json.dumps(report, indent=2).encode())

    def write_file(self, path: Path, data: bytes, *, durable: bool = False) -> str:
        """Write `data` and return its SHA-256. Whoever looks at `path` sees what was there before or all of it.

        durable: also after a power cut. The temporary file is in the work folder, not beside `path`: there one glob finds what a
        kill left behind."""
        with self._temporary(path, durable) as stream:
            stream.write(data)
        return hashlib.sha256(data).hexdigest()

    def _replace(self, path: Path, lines: Iterable[str]) -> None:
        """`write_file` of lines that need not be in memory together, durable."""
        with self._temporary(path, durable=True) as stream:
            for line in lines:
                stream.write(line.encode())

    @contextmanager
    def _temporary(self, path: Path, durable: bool) -> Iterator[BinaryIO]:
        temporary = self.work / f"{secrets.token_hex(8)}.part"
        try:
            with temporary.open("wb") as stream:
                yield stream
                if durable:
                    stream.flush()
                    os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def is_intact(self, record: Record) -> bool:
        """Whether the file of a written record is there, with the hash that the ledger has."""
        assert record.output is not None
        return file_sha256(os.path.join(self.path, record.output)) == record.sha256


def file_sha256(path: Path | str) -> str | None:
    """Hex digest; None when the file is not there or cannot be read."""
    try:
        with open(path, "rb", buffering=0) as stream:
            if os.fstat(stream.fileno()).st_size > 2**24:
                return hashlib.file_digest(stream, "sha256").hexdigest()
            return hashlib.sha256(stream.readall()).hexdigest()  # of a million small files a third of file_digest's time
    except OSError:
        return None


def printable(text: str) -> str:
    """On one line and on any terminal: names may hold line breaks and bytes that are no characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def to_line(row: Item | Record) -> str:
    """A line of plan.jsonl or ledger.jsonl. ASCII: names that are no valid UTF-8 travel as escapes."""
    return json.dumps({name: getattr(row, name) for name in row.__slots__}) + "\n"
