"""A job from its inputs to its summary: what it is, whether it may start here, what a resume finds done."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from clipdit.images import WRITE_FORMATS, Fit
from clipdit.offline import sources
from clipdit.offline.engine import Engine, Model
from clipdit.offline.folder import JobFolder, Record
from clipdit.offline.plan import MANIFEST_SUFFIXES, WORK_FOLDER, Item, Plan, check, plan_folder, plan_manifest, plan_url
from clipdit.offline.progress import Progress, State, Tally
from clipdit.offline.run import LocalEngine
from clipdit.offline.steps import Work
from clipdit.translator import Sampling, Size, Translator

logger = logging.getLogger(__name__)

T = TypeVar("T")

BATCH_SIZE = {"cuda": 32}
"""Images in one call when nobody says otherwise, by device; elsewhere 8."""


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """What decides how the outputs of a job look. A resumed job must have the same."""

    seed: int = 0
    """Of the job; each image gets its own from it, see `item_seed`."""
    size: Size = None
    """What images are fitted to; None is the size the checkpoint was trained at."""
    fit: Fit = "pad"
    """How; see `clipdit.images.fit`."""
    format: str = "png"
    """png, webp or jpeg: of outputs whose name does not say otherwise."""
    keep_suffix: bool = False
    """Outputs are named a.jpg.png and not a.png."""
    steps: int | None = None
    """Solver steps; None is the checkpoint's default, as for the next two."""
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 is none."""
    solver: str | None = None
    """Name of the solver."""

    @property
    def sampling(self) -> Sampling:
        """Steps, guidance and solver, as `Translator` takes them."""
        return Sampling(steps=self.steps, guidance=self.guidance, solver=self.solver)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; wanted an integer from 0 to 2**63 - 1")
        if f".{self.format}" not in WRITE_FORMATS:
            raise ValueError(f"format is {self.format}; wanted one of {', '.join(s[1:] for s in WRITE_FORMATS)}")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What one run of a job came to, in inputs unless it says otherwise."""

    total: int
    written: int
    """In this run."""
    kept: int
    """Written by earlier runs and found intact."""
    quarantined: int
    ignored: int
    """Files in the input folder that are no images."""
    unreadable: int
    """Sub-folders of the input folder that could not be listed."""
    seconds: float
    """From the first image read to the last one written."""
    batch_size: int
    """Images in one call, at the end of the run."""


def run_job(
    translator: Translator | Engine,
    source: Path | str,
    output: Path,
    settings: JobSettings | None = None,
    *,
    batch_size: int | None = None,
    resume: bool = False,
    workers: int | None = None,
    allow_urls: Sequence[str] = (),
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Translate a folder or a manifest of images into an output folder.

    Args:
        translator: or another engine, which has its own.
        source: the input folder, or a manifest, by path or as str by URL; see `plan_folder`, `plan_url` and `plan_manifest`.
        output: the output folder; it must be new or empty, or hold this very job and `resume` be true.
        batch_size: images in one call; None is 32 on CUDA and 8 elsewhere, or less if the backend takes less.
        resume: go on with the job in `output`, if there is one. Intact outputs stay; inputs that are quarantined, new in the
            folder, or whose output is gone or altered are done.
        workers: threads that read and write; None is one a core, at most 8.
        allow_urls: prefixes of the URLs that a manifest may name.
        on_progress: called by this thread before the first image and after every batch.

    Raises:
        ValueError: the inputs, the settings or the output folder will not do (then nothing was done), or writing became
            impossible (then a resume goes on).
    """
    settings = settings or JobSettings()
    engine = LocalEngine(translator) if isinstance(translator, Translator) else translator
    source = sources.local_path(str(source))
    folder = JobFolder(output)
    _check_output(folder, resume)
    plan = _plan(source, output, settings, allow_urls)
    model = engine.describe(settings.sampling)
    batch_size = _batch_size(model, settings, batch_size)
    identity = _identity(model, source, settings)
    with folder.open():
        _check_output(folder, resume)  # again, now that no other process can change it
        workers = workers or min(8, os.cpu_count() or 1)
        if folder.exists:
            left = _resume(folder, identity, plan, workers)
        else:
            folder.write_plan(plan.items)
            left = plan.items
        folder.write_job({"settings": identity, "ignored": plan.ignored, "unreadable": plan.unreadable})
        kept = len(plan.items) - len(left)
        tally = Tally(folder, engine=engine.name, total=len(plan.items), kept=kept, on_progress=on_progress)
        work = Work(
            folder=folder,
            limits=model.limits,
            size=settings.size,
            fit=settings.fit,
            sampling=settings.sampling,
            batch_size=batch_size,
            workers=workers,
        )
        end: State = "failed"
        try:
            batch_size = engine.run(left, work, tally.add)
            end = "done"
        except OSError as error:  # of writing: what cannot be read is quarantined
            raise ValueError(
                f"{error.filename2 or error.filename or output}: {error.strerror or error}; {tally.finished} of {tally.total} "
                "inputs are finished. Mend that, then go on with --resume"
            ) from error
        except KeyboardInterrupt:
            end = "interrupted"
            raise
        finally:
            folder.clear_leftovers()  # of an engine's processes that were killed
            tally.end(end)
    return Summary(
        total=tally.total,
        written=tally.finished - tally.quarantined - kept,
        kept=kept,
        quarantined=tally.quarantined,
        ignored=len(plan.ignored),
        unreadable=len(plan.unreadable),
        seconds=tally.seconds,
        batch_size=batch_size,
    )


def _batch_size(model: Model, settings: JobSettings, wanted: int | None) -> int:
    """Images in one call. ValueError when the backend does not take so many, or not their size."""
    limits = model.limits
    default = BATCH_SIZE.get(limits.device.type, 8)
    batch_size = min(default, limits.max_batch or default) if wanted is None else wanted
    if batch_size < 1 or (limits.max_batch is not None and batch_size > limits.max_batch):
        raise ValueError(f"batch size is {batch_size}; this backend takes 1 to {limits.max_batch or 'any number'}")
    if isinstance(settings.size, tuple):
        limits.check_images((1, 3, *settings.size))
    return batch_size


def _plan(source: str, output: Path, settings: JobSettings, allow_urls: Sequence[str]) -> Plan:
    options = {"seed": settings.seed, "suffix": f".{settings.format}", "keep_suffix": settings.keep_suffix}
    if sources.is_url(source):
        sources.check_url(source)
        if is_manifest(source):
            return plan_manifest(source, output, allow_urls=allow_urls, **options)
        return plan_url(source, output, **options)
    if is_manifest(source):
        return plan_manifest(Path(source), output, allow_urls=allow_urls, **options)
    return plan_folder(Path(source), output, **options)


def is_manifest(source: str) -> bool:
    """Whether an input is a list of images, by its name."""
    if sources.is_url(source):
        return source.split("::")[0].lower().endswith(MANIFEST_SUFFIXES)
    return source.lower().endswith(MANIFEST_SUFFIXES) and not os.path.isdir(source)


def _identity(model: Model, source: str, settings: JobSettings) -> dict[str, Any]:
    """Everything the outputs depend on, as job.json has it. The engine is not of it: one goes on where another was stopped."""
    limits = model.limits
    size = settings.size or limits.native_size
    return {
        "input": source if sources.is_url(source) else str(Path(source).resolve()),
        "model": model.fingerprint,
        "backend": model.backend,
        "dtype": str(limits.dtype).removeprefix("torch."),
        **asdict(settings),
        **asdict(model.sampling),
        "size": list(size) if isinstance(size, tuple) else size,
    }


def _check_output(folder: JobFolder, resume: bool) -> None:
    if folder.path.exists() and not folder.path.is_dir():
        raise ValueError(f"{folder.path} is a file; wanted a folder for the outputs")
    if folder.exists and not resume:
        raise ValueError(f"{folder.path} holds a job already. Add --resume to go on with it, or choose another output folder")
    # plan.jsonl alone is what a kill leaves between planning and the first image
    if not folder.exists and folder.path.is_dir() and set(os.listdir(folder.path)) - {WORK_FOLDER, "plan.jsonl"}:
        raise ValueError(f"{folder.path} is not empty and holds no job of clipdit. Choose another output folder")


def _resume(folder: JobFolder, identity: dict[str, Any], plan: Plan, workers: int) -> list[Item]:
    """What is to be done yet; the ledger is left with the records of all else. `plan`, made of the input as it is now, becomes
    what the job had, with what is new in the input behind it.

    Of the million inputs that a job may have, the plan is in memory once, and the records are not."""
    for name, before in folder.read_job()["settings"].items():
        if identity.get(name) != before:
            raise ValueError(
                f"{folder.path} holds a job with {name} = {before}; now it is {identity.get(name)}. "
                "Use the same, or another output folder"
            )
    now, position = plan.items, 0
    found: dict[str, Item] | None = None  # needed only if the inputs are others by now, or in another order
    items: list[Item] = []
    for before in folder.read_plan():
        if found is None and position < len(now) and now[position].id == before.id:
            item = now[position]
            position += 1
        else:
            if found is None:
                found = {item.id: item for item in now[position:]}
            item = found.pop(before.id, before)
        for name in ("output", "seed"):
            if getattr(item, name) != getattr(before, name):
                raise ValueError(
                    f"{folder.path} holds a job in which {item.id} has {name} {getattr(before, name)}; now it is "
                    f"{getattr(item, name)}. Use another output folder"
                )
        items.append(item if item == before else before)
    fresh = now[position:] if found is None else list(found.values())
    plan.items[:] = items + fresh if fresh else items
    del items
    if fresh:
        check(plan, folder.path)
        folder.write_plan(plan.items)
    return _unfinished(folder, plan, workers)


def _unfinished(folder: JobFolder, plan: Plan, workers: int) -> list[Item]:
    """Inputs without a record that says "written" and whose output is intact. Other records leave the ledger."""
    left = {item.id: item for item in plan.items}
    written = readable = 0

    def is_finished(record: Record) -> bool:
        item = left.get(record.id)
        return record.status == "written" and item is not None and record.output == item.output and folder.is_intact(record)

    def are_finished(records: list[Record]) -> list[bool]:  # a future for each would cost more than hashing a small file
        return [is_finished(record) for record in records]

    keep = bytearray()
    with ThreadPoolExecutor(workers) as pool:
        for chunk in _batched(folder.read_ledger(), 1024):
            records = [record for record, _ in chunk]
            readable = chunk[-1][1]
            finished = [whole for group in pool.map(are_finished, _batched(records, 32)) for whole in group]
            for record, whole in zip(records, finished, strict=True):
                written += record.status == "written"
                keep.append(whole and left.pop(record.id, None) is not None)  # a line that comes twice stays once
    if readable < folder.ledger_bytes or not all(keep):
        folder.write_ledger(record for (record, _), kept in zip(folder.read_ledger(), keep, strict=True) if kept)
    done = len(plan.items) - len(left)
    altered = f", {written - done} outputs are gone or altered and are made again" if done < written else ""
    logger.info("going on with %s: %d of %d inputs are done%s", folder.path, done, len(plan.items), altered)
    return list(left.values())


def _batched(things: Iterable[T], count: int) -> Iterator[list[T]]:
    iterator = iter(things)
    while chunk := list(islice(iterator, count)):
        yield chunk
