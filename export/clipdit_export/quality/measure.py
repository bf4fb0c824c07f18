"""What the gate decides by: drift of every step, distance of final images, and time, side by side in one run."""

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import psutil
import torch
from torch import Tensor

from clipdit.images import to_float
from clipdit.measuring import Spread, time_calls_ms
from clipdit.metrics.perceptual import STLPIPS
from clipdit.metrics.pixels import psnr, ssim
from clipdit.metrics.weights import MissingWeights
from clipdit.provenance import hardware
from clipdit.shapes import ImageU8
from clipdit.translator import Translator
from clipdit_export.backends.base import Graph
from clipdit_export.backends.opening import open_variant
from clipdit_export.bundle import Bundle
from clipdit_export.manifest import REFERENCE, Quality, Speed
from clipdit_export.names import name_of
from clipdit_export.precision.search import relative_error
from clipdit_export.quality.trajectory import Trajectory, record
from clipdit_export.sessions import Feed

logger = logging.getLogger(__name__)


class Judge:
    """Measures variants of one bundle on the same sources and seeds."""

    def __init__(self, bundle: Bundle, sources_u8: ImageU8, *, seeds: Sequence[int], targets_u8: ImageU8 | None = None):
        self.bundle, self.sources, self.seeds, self.targets = bundle, sources_u8, list(seeds), targets_u8
        self.reference = record(bundle, REFERENCE, sources_u8, seeds=seeds)
        try:
            self._network = STLPIPS()
        except MissingWeights:
            self._network = None
        self._exact: list[list[Feed]] | None = None

    def quality(self, variant: str) -> Quality:
        """Free-running images and teacher-forced drift: the first is what a user sees, the second says where it comes from."""
        known = {"images": len(self.sources), "drift": self._drift(variant)}
        try:
            images = record(self.bundle, variant, self.sources, seeds=self.seeds).images
        except ValueError as error:
            if "not finite" not in str(error):
                raise
            return Quality(**known, finite=False, psnr_db=0.0, ssim=0.0, st_lpips=None)
        wanted = self.reference.images
        return Quality(
            **known,
            finite=True,
            psnr_db=float(psnr(images, wanted).mean()),
            ssim=float(ssim(images, wanted).mean()),
            st_lpips=self._distance(images, wanted),
            st_lpips_to_target=self._distance(images, self.targets),
        )

    def _distance(self, images: ImageU8, others: ImageU8 | None) -> float | None:
        if self._network is None or others is None:
            return None
        with torch.inference_mode():
            pairs: list[tuple[Tensor, Tensor]] = list(zip(images.split(1), others.split(1), strict=True))
            return sum(float(self._network(to_float(one), to_float(other))) for one, other in pairs) / len(pairs)

    def _drift(self, variant: str) -> tuple[float, ...]:
        """By row of the table, over the first batch of images."""
        feeds = [row[: len(row) // self.reference.batches] for row in self.reference.by_row()]
        if self._exact is None:
            self._exact = self._answers(REFERENCE, feeds)
        got = self._answers(variant, feeds)
        return tuple(relative_error(one, exact) for one, exact in zip(got, self._exact, strict=True))

    def _answers(self, variant: str, rows: Sequence[Sequence[Feed]]) -> list[list[Feed]]:
        """Of a variant's step, which is open no longer than this takes."""
        size = name_of((self.sources.shape[-2], self.sources.shape[-1]))
        with closing(open_variant(self.bundle, variant)) as backend:
            step = backend.graph(size, "step")
            return [[_on_numpy(step, feed) for feed in row] for row in rows]


def _on_numpy(graph: Graph, feed: Feed) -> Feed:
    return {name: tensor.cpu().numpy() for name, tensor in graph({n: torch.from_numpy(a) for n, a in feed.items()}).items()}


def measure_speed(bundle: Bundle, variants: Sequence[str], source_u8: ImageU8, *, seconds: float) -> dict[str, Speed]:
    """Milliseconds for one image, from pixels to pixels; the variants, the reference among them, take turns.

    Where there is no memory for all of them at once, each takes turns with the reference, and its time is given at the
    reference's speed in the first pair."""
    others = [name for name in variants if name != REFERENCE]
    found: dict[str, Spread] = {}
    for group in _groups(bundle, others, source_u8):
        translators = [Translator(open_variant(bundle, name)) for name in (REFERENCE, *group)]
        calls = [lambda t=translator: t(source_u8[:1], seeds=[0]) for translator in translators]
        # three rounds, at least: large models take a minute an image
        exact, *spreads = time_calls_ms(calls, torch.device("cpu"), at_least=3, seconds=seconds)
        for translator in translators:
            translator.backend.close()
        pace = found.setdefault(REFERENCE, exact).median / exact.median
        found |= {name: _at(spread, pace) for name, spread in zip(group, spreads, strict=True)}
    cpu = str(hardware()["cpu"])
    return {
        name: Speed(per_image_ms=spread.median, spread_ms=(spread.low, spread.high), hardware=cpu)
        for name, spread in found.items()
    }


def _groups(bundle: Bundle, others: Sequence[str], source_u8: ImageU8) -> list[list[str]]:
    """All of them, or each alone, by what the reference takes: it is the largest."""
    if not others:
        return [[]]
    process = psutil.Process()
    before = process.memory_info().rss
    with Translator(open_variant(bundle, REFERENCE)) as reference:
        reference(source_u8[:1], seeds=[0], steps=1)
        taken = process.memory_info().rss - before
    if taken * len(others) <= psutil.virtual_memory().available:
        return [list(others)]
    logger.info("%.1f GB for each of %d variants are not there: they are timed one by one", taken / 1e9, len(others))
    return [[name] for name in others]


def _at(spread: Spread, pace: float) -> Spread:
    return replace(spread, median=pace * spread.median, low=pace * spread.low, high=pace * spread.high, p95=pace * spread.p95)


def as_reference(trajectory: Trajectory) -> Quality:
    """What the fp32 variant is to itself."""
    return Quality(
        images=len(trajectory.images), finite=True, drift=(0.0,) * trajectory.rows, psnr_db=100.0, ssim=1.0, st_lpips=0.0
    )
