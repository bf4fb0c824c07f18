"""Is every input of a job accounted for exactly once? Answered from the files alone, without the model."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from clipdit.offline.folder import JobFolder


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found in an output folder, in inputs."""

    total: int
    """Planned."""
    written: int
    """Whose output is there with the hash it was written with."""
    quarantined: tuple[tuple[str, str], ...]
    """(id, reason) of each."""
    problems: tuple[str, ...]
    """What is wrong, one line each; empty when every input is accounted for exactly once."""

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_job(output: Path, *, workers: int = 4) -> Verdict:
    """Check an output folder against its plan and its ledger; every written file is hashed again.

    ValueError when the folder holds no job that can be read.
    """
    folder = JobFolder(output)
    folder.read_job()
    planned = {item.id: item for item in folder.read_plan()}
    lines = list(folder.read_ledger())
    records, readable = [record for record, _ in lines], lines[-1][1] if lines else 0
    problems = []
    if readable < folder.ledger_bytes:
        problems.append(f"ledger.jsonl cannot be read after line {len(records)}")
    for id, count in Counter(record.id for record in records).items():
        if count > 1:
            problems.append(f"{id}: {count} times in the ledger")
        if id not in planned:
            problems.append(f"{id}: in the ledger, but not in the plan")
    listed = {record.id for record in records}
    problems += [f"{id}: not done yet" for id in planned if id not in listed]

    written = [record for record in records if record.status == "written"]
    whole = 0
    with ThreadPoolExecutor(workers) as pool:
        for record, intact in zip(written, pool.map(folder.is_intact, written), strict=True):
            item = planned.get(record.id)
            if item is not None and record.output != item.output:
                problems.append(f"{record.id}: written to {record.output}, planned was {item.output}")
            elif not intact:
                there = (folder.path / str(record.output)).is_file()
                problems.append(f"{record.id}: {record.output} {'has another content than was written' if there else 'is gone'}")
            else:
                whole += 1
    quarantined = tuple((record.id, record.reason or "") for record in records if record.status == "quarantined")
    problems += [f"{id}: quarantined without a reason" for id, reason in quarantined if not reason]
    return Verdict(total=len(planned), written=whole, quarantined=quarantined, problems=tuple(problems))
