"""Every way to run a model, measured in one run: latency, throughput, memory, and what is lost in the pictures.

Rivals take turns, call by call, so that a busy moment falls on all of them; the first is the reference of speed and of pictures.
Memory and the time to a first image come from a fresh process for each.
"""

import json
import logging
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch

from clipdit.backend import open_backend
from clipdit.images import to_float
from clipdit.measuring import Spread, time_calls_ms
from clipdit.metrics.judges import Judges
from clipdit.metrics.pixels import psnr, ssim
from clipdit.provenance import provenance
from clipdit.sampling import seeded_noise
from clipdit.shapes import ImageU8
from clipdit.translator import Translator

logger = logging.getLogger(__name__)
FORMAT = "clipdit-bench-1"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model on a backend."""

    model: str
    backend: str
    """Its name, with the variant of a bundle after a colon."""

    @property
    def label(self) -> str:
        """Short, and the same for the same thing in another run."""
        return f"{Path(self.model).name} on {self.backend}"


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How near images are to those of the reference, or to the targets: means over the images."""

    psnr_db: float
    ssim: float
    st_lpips_alex: float | None
    """None where the package of that metric is not installed."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What was measured of a candidate. Times in milliseconds."""

    label: str
    candidate: Candidate
    fingerprint: str
    device: str
    dtype: str
    encode: Spread
    evaluation: Spread
    """Of the network, once, one image, without guidance."""
    decode: Spread
    image: Spread
    """One image, pixels to pixels."""
    images_per_s: dict[int, float]
    """By batch size, medians."""
    image_ms_by_steps: dict[int, float]
    """One image, by steps of the solver, medians."""
    first_image_s: float
    """In a fresh process, opening included, imports not."""
    peak_memory_mib: float
    """Of that process, imports included."""
    to_reference: Likeness
    to_target: Likeness | None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """All of a run."""

    entries: list[Entry]
    left_out: dict[str, str] = field(default_factory=dict)
    """What could not run, and why."""
    protocol: dict[str, object] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        """As written to the JSON file."""
        return {
            "format": FORMAT,
            "provenance": provenance(),
            "protocol": self.protocol,
            "left_out": self.left_out,
            "entries": [asdict(entry) for entry in self.entries],
        }


def run(
    candidates: Sequence[Candidate],
    sources_u8: ImageU8,
    *,
    targets_u8: ImageU8 | None = None,
    steps: int | None = None,
    batches: Sequence[int] = (1, 4, 8),
    more_steps: Sequence[int] = (),
    seconds: float = 5.0,
) -> Bench:
    """Measure `candidates` side by side; the first is the reference.

    Args:
        sources_u8: images of a size that all of them take; the pictures are compared on all of them, times taken on the first.
        steps: None is the model's own number.
        batches: sizes for throughput; those beyond a backend's limit are left out.
        more_steps: one image is timed with so many steps, too.
        seconds: how long each kind of timing goes on.

    Raises ValueError when the first cannot run; what else cannot is left out with the reason.
    """
    translators: dict[Candidate, Translator] = {}
    left_out: dict[str, str] = {}
    cold = {}
    for candidate in candidates:
        try:
            cold[candidate] = _in_fresh_process(candidate, sources_u8[:1], steps)
            translators[candidate] = Translator(open_backend(candidate.model, candidate.backend))
        except ValueError as error:
            if candidate is candidates[0]:
                raise
            left_out[candidate.label] = str(error)
    together, has = sum(cold[c][1] for c in translators), psutil.virtual_memory().total / 2**20
    if together > has:  # they stay open side by side, for they take turns
        message = "these %d may need %.0f GiB at once, and there are %.0f; if the system ends the run, give fewer --backends"
        logger.warning(message, len(translators), together / 1024, has / 1024)
    judge = Judges.open().perceptual.get("st_lpips_alex")
    device = torch.device("cpu")
    try:
        images = {c: _all(t, sources_u8, steps) for c, t in translators.items()}
        calls = [lambda t=t: t(sources_u8[:1], seeds=[0], steps=steps) for t in translators.values()]
        whole = dict(zip(translators, time_calls_ms(calls, device, seconds=seconds), strict=True))
        parts = {c: _time_parts(t, sources_u8[:1], seconds / 2) for c, t in translators.items()}
        throughput = _throughput(translators, sources_u8, steps, batches, seconds)
        by_steps = _by_steps(translators, sources_u8[:1], more_steps, seconds)
        entries = [
            Entry(
                label=c.label,
                candidate=c,
                fingerprint=t.backend.fingerprint,
                device=str(t.backend.limits.device),
                dtype=str(t.backend.limits.dtype).removeprefix("torch."),
                encode=parts[c][0],
                evaluation=parts[c][1],
                decode=parts[c][2],
                image=whole[c],
                images_per_s=throughput[c],
                image_ms_by_steps=by_steps[c],
                first_image_s=cold[c][0],
                peak_memory_mib=cold[c][1],
                to_reference=_likeness(images[c], images[candidates[0]], judge),
                to_target=None if targets_u8 is None else _likeness(images[c], targets_u8, judge),
            )
            for c, t in translators.items()
        ]
    finally:
        for translator in translators.values():
            translator.backend.close()
    used = next(iter(translators.values())).settings(steps=steps)
    protocol = {
        "images": len(sources_u8),
        "size_px": list(sources_u8.shape[-2:]),
        "steps": used.steps,
        "guidance": used.guidance,
        "solver": used.solver,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "order": "candidates take turns, call by call",
    }
    return Bench(entries=entries, left_out=left_out, protocol=protocol)


def regressions(old: dict, new: dict, *, tolerance: float = 0.1, likeness: float = 0.005) -> list[str]:
    """What became worse from one record to another, a line each; empty when nothing did.

    Times of two runs compare only through something that both measured: speed is that over the reference in the same run.
    `tolerance`: the share of that which may be lost. `likeness`: how much farther (ST-LPIPS) images may be from the reference's.
    ValueError for records that share no entry, or are none."""
    for record in (old, new):
        if record.get("format") != FORMAT:
            raise ValueError(f"this is no record of `clipdit bench` (format {record.get('format')!r}; wanted {FORMAT!r})")
    if old["protocol"]["steps"] != new["protocol"]["steps"] or old["protocol"]["size_px"] != new["protocol"]["size_px"]:
        raise ValueError("the two records differ in steps or size; measure again with the same")
    before, after = ({entry["label"]: entry for entry in record["entries"]} for record in (old, new))
    shared = [label for label in before if label in after]
    if len(shared) < 2:
        raise ValueError(f"the two records share {len(shared)} entries; wanted a reference and something to compare with it")
    found = []
    for label in shared[1:]:
        gains = [entries[shared[0]]["image"]["median"] / entries[label]["image"]["median"] for entries in (before, after)]
        if gains[1] < (1 - tolerance) * gains[0]:
            found.append(f"{label}: {gains[1]:.2f} times the speed of {shared[0]}, before {gains[0]:.2f}")
        distances = [entries[label]["to_reference"]["st_lpips_alex"] for entries in (before, after)]
        if None not in distances and distances[1] > distances[0] + likeness:
            found.append(f"{label}: {distances[1]:.4f} from the reference's images (ST-LPIPS), before {distances[0]:.4f}")
    found += [f"{label}: no longer there" for label in before if label not in after]
    return found


def read_record(path: Path) -> dict:
    """ValueError, one line, for a file that is none."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is no record of `clipdit bench`")
    return record


def _all(translator: Translator, sources_u8: ImageU8, steps: int | None) -> ImageU8:
    size = min(4, translator.backend.limits.max_batch or 4)
    chunks = range(0, len(sources_u8), size)
    return torch.cat(
        [translator(sources_u8[i : i + size], seeds=range(i, min(i + size, len(sources_u8))), steps=steps) for i in chunks]
    )


def _likeness(images: ImageU8, others: ImageU8, judge) -> Likeness:
    distance = None
    if judge is not None:
        with torch.inference_mode():
            pairs = zip(images.split(1), others.split(1), strict=True)
            distance = sum(float(judge(to_float(one), to_float(other))) for one, other in pairs) / len(images)
    return Likeness(psnr_db=float(psnr(images, others).mean()), ssim=float(ssim(images, others).mean()), st_lpips_alex=distance)


def _time_parts(translator: Translator, one: ImageU8, seconds: float) -> tuple[Spread, ...]:
    backend, device = translator.backend, translator.backend.limits.device
    one = one.to(device)
    with torch.inference_mode():
        condition = backend.encode(one)
        x = seeded_noise([0], tuple(condition.latent.shape[1:]), device)
        t = torch.full((1,), 0.5, device=device)
        calls = [lambda: backend.encode(one), lambda: backend.velocity(x, t, condition), lambda: backend.decode(condition.latent)]
        return tuple(time_calls_ms(calls, device, warm_up=2, seconds=seconds))


def _throughput(
    translators: dict[Candidate, Translator], sources_u8: ImageU8, steps: int | None, batches: Sequence[int], seconds: float
) -> dict[Candidate, dict[int, float]]:
    found: dict[Candidate, dict[int, float]] = {candidate: {} for candidate in translators}
    for size in batches:
        images = sources_u8[torch.arange(size) % len(sources_u8)]
        able = [c for c, t in translators.items() if size <= (t.backend.limits.max_batch or size)]
        calls = [lambda t=translators[c], u8=images: t(u8, seeds=range(len(u8)), steps=steps) for c in able]
        for candidate, spread in zip(able, time_calls_ms(calls, torch.device("cpu"), at_least=3, seconds=seconds), strict=True):
            found[candidate][size] = 1000 * size / spread.median
    return found


def _by_steps(
    translators: dict[Candidate, Translator], source_u8: ImageU8, counts: Sequence[int], seconds: float
) -> dict[Candidate, dict[int, float]]:
    found: dict[Candidate, dict[int, float]] = {candidate: {} for candidate in translators}
    for steps in counts:
        calls = [lambda t=t, n=steps: t(source_u8, seeds=[0], steps=n) for t in translators.values()]
        for candidate, spread in zip(found, time_calls_ms(calls, torch.device("cpu"), at_least=3, seconds=seconds), strict=True):
            found[candidate][steps] = spread.median
    return found


def _in_fresh_process(candidate: Candidate, source_u8: ImageU8, steps: int | None) -> tuple[float, float]:
    """(seconds to the first image, peak memory in MiB)."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_first_image, args=(theirs, candidate, source_u8, steps, torch.get_num_threads()))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError as error:
        raise ValueError(f"{candidate.label}: its process ended without an answer (out of memory?)") from error
    finally:
        process.join()
    if isinstance(answer, str):
        raise ValueError(answer)
    return answer


def _first_image(pipe, candidate: Candidate, source_u8: ImageU8, steps: int | None, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        began = time.perf_counter()
        with Translator(open_backend(candidate.model, candidate.backend)) as translator:
            translator(source_u8, seeds=[0], steps=steps)
            taken = time.perf_counter() - began
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        pipe.send((taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20))
    except ValueError as error:
        pipe.send(str(error))
