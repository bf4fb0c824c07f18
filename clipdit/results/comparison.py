"""Trains, evaluates and times the methods, one after another, in a folder that says what it is a comparison of.

    plan.json                 the settings; a folder of other settings is refused
    runs/METHOD/seed-S/       a checkpoint each, with its history
    evaluations/NAME/seed-S.json (.png)      what `clipdit evaluate` found, by method and number of steps
    cost.json                 parameters, operations and milliseconds an image of all of them, in turns

What is there is not done again, and a training that was stopped goes on; so a comparison of days can be run in parts. Each
training is a process of its own: none inherits memory, or a random state, from the one before.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clipdit.experiment import EXPERIMENT_FILE, Experiment, TranslationExperiment, to_json
from clipdit.files import write_atomically
from clipdit.presets import student
from clipdit.provenance import provenance
from clipdit.results.cost import COST_FILE, measure
from clipdit.results.methods import METHODS, student_of
from clipdit.train.guard import check_same_experiment, flat, flat_as_now

logger = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
FINISHED_FILE = "finished.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared, on what, and for how long."""

    data: Path
    base: TranslationExperiment
    """Ours; the others are made from it."""
    preset: str
    """Its name."""
    methods: tuple[str, ...]
    minutes: float
    """Of training for each method and seed; reading, caching and compiling for the first time included in none."""
    seeds: tuple[int, ...] = (0,)
    ablation_seeds: int = 1
    """So many of them, the first, for the ablations, of which there are many."""
    best_of: int = 8
    limit: int | None = None
    """Held-out pairs that are translated; None is all."""
    clip: str | None = None
    """The CLIP that judges; None is the base's."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            got = ", ".join(unknown) or "no method"
            raise ValueError(f"{got}: no method of the comparison; there are {', '.join(METHODS)}")
        for name in self.methods:
            teacher = METHODS[name].teacher
            if teacher and teacher not in self.methods:
                raise ValueError(f"{name} learns from {teacher}, which is not among the methods; add it")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds are {list(self.seeds)}; wanted different numbers from 0 on, at least one")
        if not 1 <= self.ablation_seeds <= len(self.seeds):
            raise ValueError(f"ablation_seeds is {self.ablation_seeds}; wanted 1 to the number of seeds, {len(self.seeds)}")
        if not self.minutes > 0:
            raise ValueError(f"minutes is {self.minutes}; wanted more than 0")

    def seeds_of(self, method: str) -> tuple[int, ...]:
        return self.seeds[: self.ablation_seeds] if METHODS[method].role == "ablation" else self.seeds

    def to_json(self) -> dict:
        """What makes two comparisons the same. The folder of the data by its name: where it lies changes nothing."""
        plain = {name: value for name, value in asdict(self).items() if name not in ("data", "base")}
        return json.loads(json.dumps(plain | {"data": self.data.name, "base": to_json(self.base, self.preset)}))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A method with a number of sampling steps; None is its default."""

    method: str
    steps: int | None = None

    @property
    def name(self) -> str:
        return self.method if self.steps is None else f"{self.method}-{self.steps}-steps"

    @property
    def label(self) -> str:
        method = METHODS[self.method]
        if self.steps is None:
            return method.label if method.role != "student" else f"{method.label}, 1 step"
        return f"{method.label}, {self.steps} step{'s' if self.steps > 1 else ''}"


def variants(plan: Plan) -> list[Variant]:
    """All that is evaluated, in the order of tables and sheets, which is that of METHODS, in whatever order they are trained."""
    methods = [name for name in METHODS if name in plan.methods]
    return [Variant(method=name, steps=steps) for name in methods for steps in (None, *METHODS[name].steps)]


def run_folder(out: Path, method: str, seed: int) -> Path:
    return out / "runs" / method / f"seed-{seed}"


def evaluation_file(out: Path, variant: Variant, seed: int) -> Path:
    return out / "evaluations" / variant.name / f"seed-{seed}.json"


def compare(plan: Plan, out: Path, *, device: str | None = None) -> dict[str, str]:
    """Do what is not done yet. Returns what could not be done: name -> reason, empty when all went well.

    ValueError when `out` is a comparison of other settings, or holds a run of what a method was before it changed."""
    _claim(plan, out)
    _check_finished(plan, out)
    failed: dict[str, str] = {}
    for seed in plan.seeds:  # a seed of every method before the second of any: what is there early can be compared
        for name in (name for name in plan.methods if seed in plan.seeds_of(name)):
            try:
                _train(plan, name, seed, out)
                for variant in variants(plan):
                    if variant.method == name:
                        _evaluate(plan, variant, seed, out, device)
            except ChildFailed as error:
                failed[f"{name}, seed {seed}"] = str(error)
                logger.error("%s, seed %d: %s", name, seed, error)
    _measure_cost(plan, out, device)
    return failed


def experiment_of(plan: Plan, name: str, seed: int, out: Path) -> tuple[Experiment, str]:
    """The experiment of a method, and the preset that it is a variant of."""
    method = METHODS[name]
    base = replace(plan.base, train=replace(plan.base.train, seed=seed))
    # one cache for all that read the same latents; its name says what they were made from
    base = replace(base, pairs=replace(base.pairs, cache=out / "cache"))
    if method.make is None:
        return student_of(base, student(), str(run_folder(out, method.teacher, seed))), "student"
    made = method.make(base)
    return made, plan.preset if isinstance(made, TranslationExperiment) else name


class ChildFailed(ValueError):
    """A process that trained or evaluated ended with an error; the message is its last line."""


def _claim(plan: Plan, out: Path) -> None:
    path, wanted = out / PLAN_FILE, plan.to_json()
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))["plan"]
        before = found | {"base": flat_as_now(found["base"], wanted["base"])}
        now = wanted | {"base": flat(wanted["base"])}
        for name in now:
            # more methods and seeds may come to what is there
            if name not in ("methods", "seeds", "ablation_seeds") and before.get(name) != now[name]:
                raise ValueError(f"{out} is a comparison with another setting of {name}; give a new folder, or take its settings")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is there already and holds no {PLAN_FILE}; give a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"plan": wanted, **provenance()}, indent=2) + "\n")


def _check_finished(plan: Plan, out: Path) -> None:
    for seed in plan.seeds:
        for name in plan.methods:
            folder = run_folder(out, name, seed)
            if not (folder / FINISHED_FILE).exists():
                continue  # one that goes on is checked by the training itself
            wanted = to_json(*experiment_of(plan, name, seed, out)) | {"teacher": ""}  # a place, as the caller gave it
            stored = json.loads((folder / EXPERIMENT_FILE).read_text(encoding="utf-8")) | {"teacher": ""}
            try:
                check_same_experiment(json.dumps(stored), wanted)
            except ValueError as error:
                evaluated = out / "evaluations" / name
                raise ValueError(
                    f"{folder} is of another {name}: {error}, or delete it and {evaluated}*, and it is done again"
                ) from None


def _train(plan: Plan, name: str, seed: int, out: Path) -> None:
    folder = run_folder(out, name, seed)
    if (folder / FINISHED_FILE).exists():
        return
    experiment, preset = experiment_of(plan, name, seed, out)
    logger.info("training %s, seed %d, for %g minutes", name, seed, plan.minutes)
    (out / COST_FILE).unlink(missing_ok=True)  # it may tell of another network that had this place
    _in_a_process(_train_here, experiment, preset, plan.data, folder, plan.minutes)
    write_atomically(folder / FINISHED_FILE, json.dumps({"minutes": plan.minutes}) + "\n")


def _train_here(experiment: Experiment, preset: str, data: Path, folder: Path, minutes: float) -> None:
    from clipdit.train.runs import run
    from clipdit.train.state import STATE_FILE

    run(experiment, preset, data, folder, resume=(folder / STATE_FILE).exists(), minutes=minutes)


def _evaluate(plan: Plan, variant: Variant, seed: int, out: Path, device: str | None) -> None:
    file = evaluation_file(out, variant, seed)
    if file.exists():
        return
    logger.info("evaluating %s, seed %d", variant.name, seed)
    options = {
        "data": plan.data,
        "model": str(run_folder(out, variant.method, seed)),
        "out": file,
        "backend": "eager",
        "best_of": plan.best_of,
        "direction": plan.base.pairs.direction,
        "steps": variant.steps,
        "limit": plan.limit,
        "clip": plan.clip or plan.base.clip,
        "device": device,
    }
    _in_a_process(_evaluate_here, options)


def _evaluate_here(options: dict[str, Any]) -> None:
    from clipdit.commands.evaluate import evaluate

    evaluate(**options)


def _in_a_process(function: Callable[..., None], *arguments: object) -> None:
    """Call it in a fresh process. ChildFailed when it raises, KeyboardInterrupt when it is interrupted."""
    # a server that has imported what is slow to import, and nothing else, forks them
    context: Any = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    context.set_forkserver_preload(["clipdit.train.runs", "clipdit.evaluate"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_report, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        said = ours.recv()
    except EOFError:
        said = "ended without a word, as a process does that the system kills for its memory"
    finally:
        process.join()
        ours.close()
    if said is not None:
        raise ChildFailed(said)


def _end_with_the_parent(pipe) -> None:
    """A training whose comparison was killed saves and ends, as at Ctrl-C; anything else just ends. (Not by SIGINT itself, which
    whatever runs in the background of a script ignores.)"""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()  # nothing is ever sent
    os.kill(os.getpid(), signal.SIGTERM)


def _report(pipe, function: Callable[..., None], arguments: tuple) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    threading.Thread(target=_end_with_the_parent, args=(pipe,), daemon=True).start()
    said = None
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is the parent's, for its result
            function(*arguments)
    except (ValueError, OSError) as error:
        said = str(error) or type(error).__name__
    except KeyboardInterrupt:  # the parent has it, too
        said = "interrupted"
    with contextlib.suppress(BrokenPipeError):  # the comparison was killed: nobody listens
        pipe.send(said)


def _measure_cost(plan: Plan, out: Path, device: str | None) -> None:
    """Of every variant that was evaluated, with the runs of the first seed: the others have the same networks."""
    seed = plan.seeds[0]
    done = [v for v in variants(plan) if evaluation_file(out, v, seed).exists()]
    measure({v.name: (run_folder(out, v.method, seed), v.steps) for v in done}, out, device)


def evaluations(plan: Plan, out: Path) -> Iterator[tuple[Variant, list[dict]]]:
    """What was found of each variant, a report a seed; those that were not evaluated are left out."""
    for variant in variants(plan):
        files = [evaluation_file(out, variant, seed) for seed in plan.seeds_of(variant.method)]
        reports = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
        if reports:
            yield variant, reports
