"""The main job on a handful of held-out samples: translate, measure, and show it on one page that needs no network.

What the page says of time and quality is measured while it is made, on the machine it is made on.
"""

import base64
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path

import jinja2
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from clipdit.backend import Limits, OfVariants, available_backends, backend_class, builtin_checkpoint
from clipdit.files import write_atomically
from clipdit.images import encode_image, read_image, write_image
from clipdit.measuring import Spread, time_calls_ms
from clipdit.metrics.compare import Comparison
from clipdit.metrics.edges import GivenEdges, default_tolerance_px, drawing_lines
from clipdit.metrics.judges import Judges
from clipdit.provenance import provenance
from clipdit.sampling import seeded_noise
from clipdit.shapes import ImageU8
from clipdit.sheets import contact_sheet
from clipdit.translator import Translator

logger = logging.getLogger(__name__)

STEPS_SHOWN = (1, 2, 4, 8, 20)
"""Numbers of steps that are shown, scored and timed, beside the checkpoint's own."""

EXPORTERS = "clipdit.exporters"
"""Entry points: functions (checkpoint folder, bundle folder) that export what can run on this machine."""

BATCH = 8
"""Images in one call when throughput is measured, if the backend takes so many."""

STEPS_SAMPLES = 6
"""Samples shown with every number of steps."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A column of the table of scores."""

    title: str
    higher_is_better: bool

    def best(self, values: Float[Tensor, "B S"]) -> Float[Tensor, "B"]:
        """The best of S translations of each sample."""
        return values.amax(dim=1) if self.higher_is_better else values.amin(dim=1)


METRICS = {
    "edge_f1": Metric(title="follows the drawing: edge F1", higher_is_better=True),
    "psnr_db": Metric(title="PSNR, dB", higher_is_better=True),
    "ssim": Metric(title="SSIM", higher_is_better=True),
    "st_lpips_alex": Metric(title="ST-LPIPS", higher_is_better=False),
}
"""Those of the metrics by image (docs/metrics.md) that say something of a handful of samples."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table of scores."""

    what: str
    """What was scored, in words."""
    scores: dict[str, float]
    """Metric -> mean over the samples."""
    steps: int | None = None
    """Of a row with one translation of each sample; such rows are one another's rivals."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Pairs that were not trained on."""

    names: list[str]
    source: ImageU8
    target: ImageU8


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One backend's times, milliseconds, for one image unless it says otherwise."""

    encode: Spread
    evaluation: Spread
    """Of the network, once, at batch 1 and without guidance."""
    decode: Spread
    image_by_steps: dict[int, Spread]
    """Source pixels to output pixels, by number of steps."""
    batch: Spread
    """`batch_size` images at the checkpoint's own number of steps."""
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the checkpoint."""

    name: str
    device: str
    dtype: str
    timing: Timing
    first_image_s: float
    """From nothing to the first image: loading, compiling, warming up; seconds."""
    largest_difference: int
    """To the reference's images, of 255 levels."""
    mean_difference: float


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Everything the page shows."""

    samples: Samples
    steps: int
    guidance: float
    solver: str
    by_seed: dict[int, ImageU8]
    by_steps: dict[int, ImageU8]
    """All with the first seed."""
    table: list[Row]
    notes: list[str]
    """What could not be measured or run, and why."""
    reference: str
    """The variant whose pixels the others' are compared with: the checkpoint as it was trained, where that is among them."""
    variants: list[Variant] = field(default_factory=list)

    def record(self) -> dict[str, object]:
        """The numbers, for bench.json."""
        return {
            "provenance": provenance(),
            "samples": self.samples.names,
            "settings": {"steps": self.steps, "guidance": self.guidance, "solver": self.solver, "seeds": list(self.by_seed)},
            "variants": [asdict(variant) for variant in self.variants],
            "scores": {row.what: row.scores for row in self.table},
            "notes": self.notes,
        }


def read_samples(folder: Path) -> Samples:
    """The pairs in `source/` and `target/`, equal file names, in order of their names. ValueError if there are none or one lacks
    its partner."""
    sources, targets = ({path.stem: path for path in sorted((folder / side).glob("*.png"))} for side in ("source", "target"))
    if not sources or sources.keys() != targets.keys():
        raise ValueError(f"{folder} holds {len(sources)} sources and {len(targets)} targets; wanted pairs with equal names")
    return Samples(
        names=list(sources),
        source=torch.stack([read_image(path) for path in sources.values()]),
        target=torch.stack([read_image(path) for path in targets.values()]),
    )


def run_demo(
    folder: Path | None = None,
    samples_folder: Path | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3),
    backends: Mapping[str, str | None] | None = None,
    bundle: Path | None = None,
    open_translator: Callable[[Path, str], Translator] = lambda folder, name: Translator.open(folder, backend=name),
    seconds: float = 2.0,
) -> Demo:
    """Translate the samples with every backend that can run here, and measure.

    Args:
        folder: checkpoint; None is the built-in one. `samples_folder`: see `read_samples`; None is beside the built-in one.
        seeds: one translation of each sample for each of them.
        backends: name -> why it cannot run here, or None; the first of those that can makes the pictures. None is what
            `available_backends` finds, without those that are only opened by name.
        bundle: an export of the checkpoint; its variants (NAME:VARIANT among the backends) are opened from there.
        open_translator: (folder, backend's name) -> Translator.
        seconds: how long each timing goes on; a timing has at least five rounds.
    """
    folder = folder or builtin_checkpoint()
    samples = read_samples(samples_folder or builtin_checkpoint().parent / "samples")
    if backends is None:
        backends = available_backends(folder, unasked=True)
    usable = [name for name, reason in backends.items() if reason is None]
    if not usable:
        raise ValueError("; ".join(f"the {name} backend cannot run {folder}: {reason}" for name, reason in backends.items()))
    notes = [f"The {name} backend was left out: {reason}." for name, reason in backends.items() if reason is not None]

    demo: Demo | None = None
    reference = "eager" if "eager" in usable else usable[0]
    first_seed: dict[str, ImageU8] = {}
    timings: dict[str, tuple[Timing, float, Limits]] = {}
    for name in usable:
        logger.info("translating %d samples with %d seeds on the %s backend", len(samples.names), len(seeds), name)
        began = time.perf_counter()
        with open_translator(bundle if bundle is not None and ":" in name else folder, name) as translator:
            translate_all(translator, samples.source[:1], seeds[0])
            first_image_s = time.perf_counter() - began
            # the first shows every seed; of the others one seed is enough to compare with it
            by_seed = {seed: translate_all(translator, samples.source, seed) for seed in (seeds if demo is None else seeds[:1])}
            if demo is None:
                demo = _looked_at(translator, samples, by_seed, notes, reference)
            timing = time_backend(translator, samples.source, sorted(demo.by_steps), seconds=seconds)
            first_seed[name], timings[name] = by_seed[seeds[0]], (timing, first_image_s, translator.backend.limits)
    assert demo is not None
    for name, (timing, first_image_s, limits) in timings.items():
        difference = (first_seed[name].short() - first_seed[reference].short()).abs()
        demo.variants.append(
            Variant(
                name=name.rpartition(":")[2],
                device=str(limits.device),
                dtype="" if ":" in name else str(limits.dtype).removeprefix("torch."),
                timing=timing,
                first_image_s=first_image_s,
                largest_difference=int(difference.max()),
                mean_difference=float(difference.float().mean()),
            )
        )
    return demo


def export_bundle(folder: Path, out: Path) -> tuple[Path | None, str]:
    """(bundle, "") of a checkpoint, made by the exporter that is installed beside the core; (None, reason) where there is none or
    it cannot work here."""
    reason = "no exporter is installed"
    for entry in entry_points(group=EXPORTERS):
        try:
            entry.load()(folder, out)
        except ModuleNotFoundError as error:
            reason = f"the Python package {error.name} is not installed; install clipdit with its extra onnx or openvino"
        except ValueError as error:
            reason = str(error)
        else:
            return out, ""
    return None, reason


def ways(folder: Path, bundle: Path | None) -> dict[str, str | None]:
    """For `run_demo`: the best variant of the bundle for each of its runtimes, then what runs the checkpoint as it is."""
    found: dict[str, str | None] = {}
    for name, reason in available_backends(bundle, unasked=True).items() if bundle is not None else ():
        kind = backend_class(name) if reason is None else None
        if bundle is not None and isinstance(kind, OfVariants):
            found[f"{name}:{kind.variants(bundle)[0]}"] = None
    plain = available_backends(folder, unasked=True)
    return found | {name: reason for name, reason in plain.items() if reason is None or not found}


def translate_all(translator: Translator, source: ImageU8, seed: int, steps: int | None = None) -> ImageU8:
    """Every source with one seed, in batches that the backend takes."""
    chunks = source.split(min(BATCH, translator.backend.limits.max_batch or BATCH))
    return torch.cat([translator(chunk, seeds=[seed] * len(chunk), steps=steps) for chunk in chunks])


def time_backend(translator: Translator, source: ImageU8, steps: Iterable[int], *, seconds: float) -> Timing:
    """Time the parts, whole images by number of steps, and a batch."""
    backend, device = translator.backend, translator.backend.limits.device
    one = source[:1].to(device)
    with torch.inference_mode():
        condition = backend.encode(one)
        x = seeded_noise([0], tuple(condition.latent.shape[1:]), device)
        t = torch.full((1,), 0.5, device=device)
        parts = [lambda: backend.encode(one), lambda: backend.velocity(x, t, condition), lambda: backend.decode(condition.latent)]
        encode, evaluation, decode = time_calls_ms(parts, device, warm_up=2, seconds=seconds)
    steps = list(steps)
    images = time_calls_ms([_image_call(translator, source[:1], n) for n in steps], device, seconds=seconds)
    size = min(BATCH, len(source), backend.limits.max_batch or BATCH)
    (batch,) = time_calls_ms([_image_call(translator, source[:size], None)], device, at_least=3, seconds=seconds)
    return Timing(
        encode=encode,
        evaluation=evaluation,
        decode=decode,
        image_by_steps=dict(zip(steps, images, strict=True)),
        batch=batch,
        batch_size=size,
    )


class Referee:
    """Scores translations of the samples: faithfulness to the source, and distance to the target."""

    def __init__(self, samples: Samples) -> None:
        judges = Judges.open()
        self.missing = {name: reason for name, reason in judges.missing.items() if name in METRICS}
        height, width = samples.source.shape[-2:]
        lines = [drawing_lines(source) for source in samples.source]
        count = len(samples.names)
        self._comparison = Comparison(
            samples.source,
            samples.target,
            judges,
            given=GivenEdges(lines, tolerance_px=default_tolerance_px((height, width))),
            indices=range(count),
            others=[[] for _ in range(count)],
        )

    @torch.inference_mode()
    def row(self, what: str, *outputs: ImageU8, steps: int | None = None, itself: str = "") -> Row:
        """The mean over the samples; of several translations of each sample the best, by each metric on its own.

        Args:
            itself: "source" or "target", when the outputs are that: what compares them with themselves is left out.
        """
        together = torch.stack(outputs, dim=1)  # (n, S, 3, H, W)
        values = {} if itself == "source" else self._comparison.to_source(together)
        values |= {} if itself == "target" else self._comparison.to_target(together)
        scores = {name: float(metric.best(values[name]).mean()) for name, metric in METRICS.items() if name in values}
        return Row(what=what, scores=scores, steps=steps)


def write_demo(demo: Demo, out: Path) -> list[Path]:
    """Write report.html, bench.json, sheet.png and one PNG for each translation. Returns the files, the report first."""
    samples = demo.samples
    pictures = [out / "images" / f"{name}.seed{seed}.png" for seed in demo.by_seed for name in samples.names]
    for path, image in zip(pictures, torch.cat(list(demo.by_seed.values())), strict=True):
        write_image(path, image)
    columns = {
        "source": samples.source,
        **{f"seed {seed}": images for seed, images in demo.by_seed.items()},
        "target": samples.target,
    }
    write_image(out / "sheet.png", contact_sheet(columns, blocks=2))
    write_atomically(out / "bench.json", json.dumps(demo.record(), indent=2) + "\n")
    write_atomically(out / "report.html", render(demo))
    return [out / "report.html", out / "sheet.png", out / "bench.json", *pictures]


def render(demo: Demo) -> str:
    """The page, pictures and styles inside it."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"picture": _data_address, "title": _title, "figure": _figure}
    template = environment.from_string((files("clipdit") / "assets" / "report.html.j2").read_text("utf-8"))
    return template.render(
        demo=demo,
        own_row=next(row for row in demo.table if row.steps == demo.steps),
        metrics=METRICS,
        best=_best_rivals(demo.table),
        shown=STEPS_SAMPLES,
        provenance=provenance(),
    )


def _looked_at(
    translator: Translator, samples: Samples, by_seed: Mapping[int, ImageU8], notes: list[str], reference: str
) -> Demo:
    """What is shown and scored, from the preferred backend."""
    settings, first = translator.settings(), next(iter(by_seed))
    by_steps = {
        steps: by_seed[first] if steps == settings.steps else translate_all(translator, samples.source, first, steps)
        for steps in sorted({*STEPS_SHOWN, settings.steps})
    }
    referee = Referee(samples)
    table = [
        referee.row("the drawing itself, untranslated", samples.source, itself="source"),
        *(referee.row(f"{steps} step{'s' * (steps > 1)}", images, steps=steps) for steps, images in by_steps.items()),
        referee.row(f"{settings.steps} steps, best of {len(by_seed)} seeds", *by_seed.values()),
        referee.row("the real emoji", samples.target, itself="target"),
    ]
    return Demo(
        samples=samples,
        steps=settings.steps,
        guidance=settings.guidance,
        solver=settings.solver or "",
        by_seed=dict(by_seed),
        by_steps=by_steps,
        table=table,
        notes=[*notes, *(f"{METRICS[name].title} was not measured: {reason}." for name, reason in referee.missing.items())],
        reference=reference.rpartition(":")[2],
    )


def _image_call(translator: Translator, source: ImageU8, steps: int | None) -> Callable[[], object]:
    return lambda: translator(source, seeds=range(len(source)), steps=steps)


def _best_rivals(table: Sequence[Row]) -> dict[str, Row]:
    """Metric -> the rival that scores best."""

    rivals = [row for row in table if row.steps is not None]

    def best(name: str) -> Row:
        sign = 1 if METRICS[name].higher_is_better else -1
        return max(rivals, key=lambda row: sign * row.scores[name])

    return {name: best(name) for name in rivals[0].scores}


def _data_address(image: UInt8[Tensor, "3 H W"]) -> str:
    """An image inside the page. PNG, as lines and flat grounds pack well and nothing is lost."""
    return "data:image/png;base64," + base64.b64encode(encode_image(image, "PNG", effort=6)).decode()


def _title(name: str) -> str:
    """A sample's name in words: 1f60e_smiling-face-with-sunglasses -> smiling face with sunglasses."""
    return re.sub(r"^[0-9a-f]{4,}(-[0-9a-f]{4,})*_", "", name).replace("-", " ").replace("_", " ")


def _figure(value: float) -> str:
    """Three digits, and never an exponent: 0.0456, 4.56, 45.6, 4567."""
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1000 else f"{value:.0f}"
