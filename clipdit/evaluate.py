"""Evaluation on held-out pairs: realism, faithfulness to the source, distance to the target and diversity, side by side.

The task is one-to-many (an edge map does not say the colour), so no single number is to be believed: a blurred average is near
every target and looks like none. Rows measured by the same code stand beside the model's: `copy_source` and `mean_target`
(what is had for nothing), `real` (what the true targets score) and `autoencoded` (what a model on latents can reach at best: the
true targets through its autoencoder). What each metric is: docs/metrics.md.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from clipdit.images import Fit, ImageError, fit
from clipdit.metrics import edges
from clipdit.metrics.compare import CHUNK, HIGHER_IS_NEARER, Comparison, Samples
from clipdit.metrics.failures import Appearance, failures
from clipdit.metrics.features import extract
from clipdit.metrics.hues import Hue, hues
from clipdit.metrics.judges import Judges
from clipdit.shapes import ImageU8

T = TypeVar("T")

Translate = Callable[[ImageU8, list[int]], ImageU8]
"""(sources, one seed each) -> outputs of the same shape, uint8 on the CPU."""

Autoencode = Callable[[ImageU8], ImageU8]
"""Images -> what a model's autoencoder makes of them, uint8 on the CPU."""

OnProgress = Callable[[int, int], None]
"""Told (sources done, sources in all)."""

Faithfulness = Literal["auto", "edges", "clip", "both"]

SEED_STRIDE = 100_000
"""Sample k of source i is made with seed first + k * SEED_STRIDE + i, whatever the number of sources and samples."""

OTHER_SOURCES = 8
"""An output whose edges agree no better with its own source than with the median of this many others has ignored it."""


@runtime_checkable
class PairLike(Protocol):
    """What is asked of a pair; clipdit.data.pairs.Pair is one."""

    @property
    def id(self) -> str: ...
    def read(self) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class PairImages:
    """Pairs in memory, at one size."""

    ids: list[str]
    sources: ImageU8
    targets: ImageU8
    problems: dict[str, str] = field(default_factory=dict)
    """Pairs that could not be read: id -> reason."""

    def __len__(self) -> int:
        return len(self.ids)


def choose(pairs: Sequence[T], count: int | None, *, seed: int = 0) -> list[T]:
    """`count` pairs in an order drawn by `seed`; None is all. A smaller choice is the beginning of a larger one."""
    return random.Random(seed).sample(list(pairs), len(pairs))[:count]


def read_pairs(pairs: Sequence[PairLike], size: tuple[int, int], how: Fit = "pad") -> PairImages:
    """Read pairs, fitted to `size` (height, width). Unreadable ones are named in `problems`; ValueError if all are."""
    ids, sources, targets, problems = [], [], [], {}
    for pair in pairs:
        try:
            source, target = pair.read()
        except (ImageError, OSError) as error:
            problems[pair.id] = str(error)
            continue
        ids.append(pair.id)
        sources.append(fit(source, size, how)[0])
        targets.append(fit(target, size, how)[0])
    if not ids:
        first = next((f" ({name}: {reason})" for name, reason in problems.items()), "")
        raise ValueError(f"none of {len(pairs)} pairs can be read{first}; evaluation needs at least 1")
    return PairImages(ids=ids, sources=torch.stack(sources), targets=torch.stack(targets), problems=problems)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one kind of output scored, image by image."""

    values: dict[str, Float[Tensor, "n S"]]
    """Metric -> value by source and sample; S is 1 where only the first sample is judged."""
    features: Float[Tensor, "n F"] | None
    """Of the first sample of each source, on EfficientNet-Lite0."""
    appearance: Appearance
    """Of all samples, (n * S,), the samples of a source in a row."""
    failed: dict[str, Tensor]
    """Kind of failure -> bool (n, S)."""

    def mean(self, metric: str) -> float:
        """The expected value of one sample."""
        return float(self.values[metric].mean())

    def best(self, metric: str) -> Float[Tensor, "n"]:
        """The value of each source's best sample."""
        values = self.values[metric]
        return values.amax(dim=1) if metric in HIGHER_IS_NEARER else values.amin(dim=1)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that one evaluation found; clipdit.evaluation_report makes JSON, a table and a contact sheet of it."""

    rows: dict[str, Row]
    """"model" (unless floors only), "autoencoded" (of models on latents), "copy_source", "mean_target", "real"."""
    evaluator: "Evaluator"
    samples: int
    """Seeds a source."""
    first_seed: int
    hues: dict[str, Hue]
    """What became of the targets' colours in `autoencoded`; empty without."""
    examples: dict[str, list[Tensor]]
    """Heading -> outputs for the contact sheet, from the first sources."""
    translate_s: float
    """Seconds spent in `translate`, all samples together."""
    metrics_s: float
    """Seconds spent on everything else since the pairs were prepared."""


class Evaluator:
    """Judges outputs for fixed held-out pairs. What depends on the pairs alone is computed once, here.

    Args:
        pairs: the held-out pairs.
        judges: the networks to judge with.
        training_targets: real targets the model may have seen, for the floor `mean_target`, for what `real` scores in realism and
            for the limits of failures; None: the held-out targets serve, and `real` has no realism.
        faithfulness: "edges", "clip", "both", or "auto": edges if at least 4 of 5 sources are drawings, else CLIP.
        tolerance_px: how far an edge may lie from its line; None is 1 px at 64, 2 px at 128 and so on.
    """

    def __init__(
        self,
        pairs: PairImages,
        judges: Judges,
        *,
        training_targets: ImageU8 | None = None,
        faithfulness: Faithfulness = "auto",
        tolerance_px: int | None = None,
    ) -> None:
        self.pairs, self.judges = pairs, judges
        self.drawings = sum(edges.is_drawing(source) for source in pairs.sources) >= 0.8 * len(pairs)
        self.faithfulness = ("edges" if self.drawings else "clip") if faithfulness == "auto" else faithfulness
        size = (pairs.sources.shape[2], pairs.sources.shape[3])
        self.given = edges.GivenEdges(
            [edges.drawing_lines(source) if self.drawings else edges.image_edges(source) for source in pairs.sources],
            tolerance_px=edges.default_tolerance_px(size) if tolerance_px is None else tolerance_px,
        )
        real = pairs.targets if training_targets is None else training_targets
        self.mean_target = real.float().mean(dim=0).round().to(torch.uint8)
        self.real_appearance = Appearance.joined([Appearance.of(part) for part in real.split(CHUNK)])
        self.own_appearance = Appearance.joined([Appearance.of(part) for part in pairs.targets.split(CHUNK)])
        self.target_features = self.training_features = None
        if judges.features is not None:
            self.target_features = extract(judges.features, pairs.targets)
            if training_targets is not None:
                self.training_features = extract(judges.features, training_targets)

    @torch.no_grad()
    def score(
        self,
        rows: Mapping[str, Callable[[slice], Samples]],
        *,
        batch_size: int = CHUNK,
        on_progress: OnProgress | None = None,
    ) -> dict[str, Row]:
        """Judge several rows in one pass over the pairs. A row is a function: which sources -> their outputs."""
        n, network = len(self.pairs), self.judges.features
        values: dict[str, list[dict[str, Tensor]]] = {name: [] for name in rows}
        features: dict[str, list[Tensor]] = {name: [] for name in rows}
        appearance: dict[str, list[Appearance]] = {name: [] for name in rows}
        for start in range(0, n, batch_size):
            part = slice(start, min(start + batch_size, n))
            comparison = self._comparison(part)
            for name, outputs_of in rows.items():
                outputs = outputs_of(part)
                distances = comparison.to_target(outputs) if name != "real" else {}  # the targets are themselves
                values[name].append(distances | comparison.to_source(outputs))
                appearance[name].append(Appearance.of(outputs.flatten(0, 1)))
                if network is not None and name != "real":
                    features[name].append(extract(network, outputs[:, 0]))
            if on_progress is not None:
                on_progress(part.stop, n)
        return {name: self._row(values[name], features[name], appearance[name]) for name in rows}

    def _comparison(self, part: slice) -> Comparison:
        n, indices = len(self.pairs), range(part.start, part.stop)
        # at even distances through the set; the same others whatever the row, so that rows are compared on equal terms
        steps = sorted({1 + k * (n - 1) // OTHER_SOURCES for k in range(OTHER_SOURCES)}) if n > 1 else []
        others = [[(i + step) % n for step in steps] for i in indices]
        sources, targets = self.pairs.sources[part], self.pairs.targets[part]
        return Comparison(sources, targets, self.judges, given=self.given, indices=indices, others=others)

    def _row(self, values: list[dict[str, Tensor]], features: list[Tensor], appearance: list[Appearance]) -> Row:
        joined = {metric: torch.cat([part[metric] for part in values]) for metric in values[0]}
        shape = joined["edge_f1"].shape
        looks = Appearance.joined(appearance)
        kinds = failures(looks, self.real_appearance, self.own_appearance.repeated(shape[1]))
        failed = {kind: flags.view(shape) for kind, flags in kinds.items()}
        # nan, when there is no other source, compares false
        failed["ignored_source"] = joined["edge_f1"] <= joined["edge_f1_other_source"]
        return Row(values=joined, features=torch.cat(features) if features else None, appearance=looks, failed=failed)

    def run(
        self,
        translate: Translate | None,
        *,
        autoencode: Autoencode | None = None,
        samples: int = 8,
        first_seed: int = 0,
        batch_size: int = CHUNK,
        sheet_rows: int = 12,
        sheet_samples: int = 3,
        on_progress: OnProgress | None = None,
    ) -> Evaluation:
        """Translate every source with `samples` seeds, and judge that beside the floors; None judges the floors only. autoencode:
        None leaves the row `autoencoded` out."""
        if samples < 1:
            raise ValueError(f"{samples} samples a source; wanted at least 1")
        if samples * SEED_STRIDE + len(self.pairs) + first_seed >= 2**63 or first_seed < 0:
            raise ValueError(f"first seed is {first_seed}; wanted 0 or a positive integer well below 2^63")
        started, spent_s = time.perf_counter(), 0.0
        shown: list[Samples] = []
        copies: list[ImageU8] = []

        def autoencoded(part: slice) -> Samples:
            assert autoencode is not None
            copies.append(autoencode(self.pairs.targets[part]))
            return copies[-1][:, None]

        def model(part: slice) -> Samples:
            nonlocal spent_s
            assert translate is not None
            sources, begin = self.pairs.sources[part], time.perf_counter()
            seeds = [[first_seed + k * SEED_STRIDE + i for i in range(part.start, part.stop)] for k in range(samples)]
            outputs = torch.stack([translate(sources, each) for each in seeds], dim=1)  # (B, S, 3, H, W)
            spent_s += time.perf_counter() - begin
            if part.start < sheet_rows:
                shown.append(outputs[:, :sheet_samples])
            return outputs

        rows: dict[str, Callable[[slice], Samples]] = {"model": model} if translate is not None else {}
        rows |= {"autoencoded": autoencoded} if autoencode is not None else {}
        rows |= {
            "copy_source": lambda part: self.pairs.sources[part][:, None],
            "mean_target": lambda part: self.mean_target.expand(part.stop - part.start, 1, *self.mean_target.shape),
            "real": lambda part: self.pairs.targets[part][:, None],
        }
        scored = self.score(rows, batch_size=batch_size, on_progress=on_progress)
        outputs = torch.cat(shown)[:sheet_rows].unbind(dim=1) if shown else ()
        headings = ["output"] + [f"seed {k + 1}" for k in range(1, len(outputs))]
        return Evaluation(
            rows=scored,
            evaluator=self,
            samples=samples if translate is not None else 0,
            first_seed=first_seed,
            hues=hues(self.pairs.targets, torch.cat(copies)) if copies else {},
            examples={heading: list(images) for heading, images in zip(headings, outputs, strict=False)},
            translate_s=spent_s,
            metrics_s=time.perf_counter() - started - spent_s,
        )


def evaluate(
    translate: Translate | None,
    pairs: Sequence[PairLike],
    *,
    size: tuple[int, int],
    training: Sequence[PairLike] = (),
    training_limit: int = 400,
    judges: Judges | None = None,
    faithfulness: Faithfulness = "auto",
    tolerance_px: int | None = None,
    how: Fit = "pad",
    samples: int = 8,
    first_seed: int = 0,
    batch_size: int = CHUNK,
    sheet_rows: int = 12,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Evaluate on held-out pairs, from files to numbers. To judge several models on the same pairs, make one `Evaluator`.

    Args:
        translate: (sources, seeds) -> outputs; None measures the floors only.
        pairs: the held-out pairs, in the order of their seeds.
        size: (height, width) in pixels that pairs are fitted to, in the manner of `how`.
        training: pairs whose targets the model may have seen; `training_limit` of them, chosen at random, are read.
        judges: None opens what is installed, on the CPU, without CLIP.

    Raises:
        ValueError: no pair can be read, or `translate` returns something else than images of its sources' shape.
    """
    judges = judges or Judges.open()
    images = read_pairs(pairs, size, how)
    seen = read_pairs(choose(training, training_limit), size, how).targets if training else None
    evaluator = Evaluator(images, judges, training_targets=seen, faithfulness=faithfulness, tolerance_px=tolerance_px)
    return evaluator.run(
        translate, samples=samples, first_seed=first_seed, batch_size=batch_size, sheet_rows=sheet_rows, on_progress=on_progress
    )
