"""A job from its inputs to its summary: what it is, whether it may start here, what a resume finds done."""

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipdit.images import WRITE_FORMATS, Fit
from clipdit.offline.folder import JobFolder, Record
from clipdit.offline.plan import MANIFEST_SUFFIXES, WORK_FOLDER, Plan, check, plan_folder, plan_manifest
from clipdit.offline.run import Progress, Run
from clipdit.translator import Sampling, Size, Translator

logger = logging.getLogger(__name__)

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
    translator: Translator,
    source: Path,
    output: Path,
    settings: JobSettings | None = None,
    *,
    batch_size: int | None = None,
    resume: bool = False,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Translate a folder or a manifest of images into an output folder.

    Args:
        source: the input folder, or a manifest; see `plan_folder` and `plan_manifest`.
        output: the output folder; it must be new or empty, or hold this very job and `resume` be true.
        batch_size: images in one call; None is 32 on CUDA and 8 elsewhere, or less if the backend takes less.
        resume: go on with the job in `output`, if there is one. Intact outputs stay; inputs that are quarantined, new in the
            folder, or whose output is gone or altered are done.
        workers: threads that read and write; None is one a core, at most 8.
        on_progress: called by this thread before the first image and after every batch.

    Raises:
        ValueError: the inputs, the settings or the output folder will not do (then nothing was done), or writing became
            impossible (then a resume goes on).
    """
    settings = settings or JobSettings()
    limits = translator.backend.limits
    default = BATCH_SIZE.get(limits.device.type, 8)
    batch_size = min(default, limits.max_batch or default) if batch_size is None else batch_size
    if batch_size < 1 or (limits.max_batch is not None and batch_size > limits.max_batch):
        raise ValueError(f"batch size is {batch_size}; this backend takes 1 to {limits.max_batch or 'any number'}")
    if isinstance(settings.size, tuple):
        limits.check_images((1, 3, *settings.size))
    identity = _identity(translator, source, settings)
    planner = plan_manifest if source.suffix.lower() in MANIFEST_SUFFIXES and not source.is_dir() else plan_folder
    folder = JobFolder(output)
    _check_output(folder, resume)
    plan = planner(source, output, seed=settings.seed, suffix=f".{settings.format}", keep_suffix=settings.keep_suffix)
    with folder.open():
        _check_output(folder, resume)  # again, now that no other process can change it
        workers = workers or min(8, os.cpu_count() or 1)
        kept: list[Record] = []
        if folder.exists:
            plan, kept = _resume(folder, identity, plan, workers)
        else:
            folder.write_plan(plan.items)
        folder.write_job({"settings": identity, "ignored": plan.ignored, "unreadable": plan.unreadable})
        run = Run(
            translator,
            folder,
            kept=len(kept),
            total=len(plan.items),
            size=settings.size,
            fit=settings.fit,
            sampling=settings.sampling,
            batch_size=batch_size,
            workers=workers,
            on_progress=on_progress,
        )
        start_s = time.perf_counter()
        done = {record.id for record in kept}
        try:
            run.run(item for item in plan.items if item.id not in done)
        except OSError as error:  # of writing: what cannot be read is quarantined
            raise ValueError(
                f"{error.filename2 or error.filename or output}: {error.strerror or error}; {run.finished} of {len(plan.items)} "
                "inputs are finished. Mend that, then go on with --resume"
            ) from error
    return Summary(
        total=len(plan.items),
        written=run.finished - run.quarantined - len(kept),
        kept=len(kept),
        quarantined=run.quarantined,
        ignored=len(plan.ignored),
        unreadable=len(plan.unreadable),
        seconds=time.perf_counter() - start_s,
        batch_size=run.batch_size,
    )


def _identity(translator: Translator, source: Path, settings: JobSettings) -> dict[str, Any]:
    """Everything the outputs depend on, as job.json has it."""
    limits = translator.backend.limits
    sampling = translator.settings(**settings.sampling)
    size = settings.size or limits.native_size
    return {
        "input": str(source.resolve()),
        "model": translator.backend.fingerprint,
        "backend": translator.backend.name,
        "dtype": str(limits.dtype).removeprefix("torch."),
        **asdict(settings),
        **asdict(sampling),
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


def _resume(folder: JobFolder, identity: dict[str, Any], now: Plan, workers: int) -> tuple[Plan, list[Record]]:
    """The plan with what is new in the input, and the records that need not be done again; the ledger is left with just these."""
    for name, before in folder.read_job()["settings"].items():
        if identity.get(name) != before:
            raise ValueError(
                f"{folder.path} holds a job with {name} = {before}; now it is {identity.get(name)}. "
                "Use the same, or another output folder"
            )
    planned = {item.id: item for item in folder.read_plan()}
    fresh = [item for item in now.items if item.id not in planned]
    for item in now.items:
        before = planned.get(item.id, item)
        for name in ("output", "seed"):
            if getattr(item, name) != getattr(before, name):
                raise ValueError(
                    f"{folder.path} holds a job in which {item.id} has {name} {getattr(before, name)}; now it is "
                    f"{getattr(item, name)}. Use another output folder"
                )
    plan = Plan(items=[*planned.values(), *fresh], ignored=now.ignored, unreadable=now.unreadable)
    if fresh:
        check(plan, folder.path)
        folder.write_plan(plan.items)

    records, readable = folder.read_ledger()
    written = {record.id: record for record in records if record.id in planned and record.output == planned[record.id].output}
    with ThreadPoolExecutor(workers) as pool:
        intact = pool.map(folder.is_intact, written.values())
        kept = [record for record, whole in zip(written.values(), intact, strict=True) if whole]
    if readable < folder.ledger_bytes or kept != records:
        folder.write_ledger(kept)
    logger.info(
        "going on with %s: %d of %d inputs are done%s",
        folder.path,
        len(kept),
        len(plan.items),
        f", {len(written) - len(kept)} outputs are gone or altered and are made again" if len(kept) < len(written) else "",
    )
    return plan, kept
