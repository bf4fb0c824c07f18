"""The files of a bundle, one stage after the other, in a folder that nobody sees before it is whole."""

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import onnx_ir as ir
from torch import nn
from tqdm.auto import tqdm

from clipdit.pipeline import ClipDiTPipeline
from clipdit_export.audit import WrongPrecision, audit_graph, check, expected_share, wanted_of
from clipdit_export.backends.opening import open_variant, runs_here
from clipdit_export.bundle import Bundle
from clipdit_export.cache_key import export_versions
from clipdit_export.engines.build import NOTE, add_engines
from clipdit_export.graphs import save
from clipdit_export.manifest import (
    FORMAT,
    MANIFEST_FILE,
    REFERENCE,
    File,
    Manifest,
    Model,
    Quality,
    Variant,
    file_entry,
    to_json,
)
from clipdit_export.names import WHOLE, name_of
from clipdit_export.order import Order
from clipdit_export.pictures import Pictures
from clipdit_export.precision.apply import apply
from clipdit_export.precision.calibrate import Observed, observe, seen_by
from clipdit_export.precision.modelopt import MODES, apply_modelopt
from clipdit_export.precision.quantize import candidates
from clipdit_export.precision.recipe import Recipe, default_recipe
from clipdit_export.precision.search import demote, sensitivities
from clipdit_export.processor import computes_bf16, doubt
from clipdit_export.quality.gate import choose, why_not_good
from clipdit_export.quality.measure import Judge, as_reference, measure_speed
from clipdit_export.quality.trajectory import record
from clipdit_export.sessions import Feed
from clipdit_export.tracing import Graphs, trace_all
from clipdit_export.weights import WeightFile
from clipdit_export.words import readme

logger = logging.getLogger(__name__)

KEY_FILE = "key.json"
"""In a folder that is being built: what it is of."""

NOT_RUN = "was not run: the machine that exported cannot. Open it by name, or export on one that can"

README_FILE = "README.md"

SECONDS = 10.0
"""For which the variants are timed, in turns, all together."""

SEARCHED = 12
"""Calls of the step on which each node's own error is measured, about so many, evenly over images and times."""


class Assembly:
    """One export, in a folder that nobody sees before it is whole."""

    def __init__(
        self,
        folder: Path,
        pipeline: ClipDiTPipeline,
        fingerprint: str,
        name: str,
        order: Order,
        seen: Pictures,
        size: tuple[int, int],
        key: dict[str, str],
    ):
        self.folder, self.pipeline, self.name, self.order, self.pictures, self.size = folder, pipeline, name, order, seen, size
        self.key, self.model, self.objective = key, model_of(pipeline, fingerprint), pipeline.objective
        self.variants: dict[str, Variant] = {}
        self.skipped: dict[str, str] = {}
        self.opset, self.opset_ms = 0, dict[str, float]()
        self.calls: list[Feed] = []
        self.recorded: dict[str, list[Feed]] = {}
        self._entries: dict[tuple[str, int, int], File] = {}

    def run(self, sizes: Sequence[tuple[int, int]]) -> Manifest:
        """Afterwards the pipeline holds no weights any more: what is measured here needs the memory."""
        self.pipeline.scheduler.save_pretrained(self.folder / "scheduler")
        self._add_graphs(sizes)
        for network in (self.pipeline.transformer, self.pipeline.vae, self.pipeline.image_encoder):
            if isinstance(network, nn.Module):
                nn.Module.to(network, "meta")
        self._write_recipes()
        for target in self.order.targets:
            if target == "openvino":
                self._add_openvino()
            elif target != "onnx":
                given = {"gpus": self.order.gpus, "max_batch": self.order.max_batch, "flags": self.order.engine}
                add_engines(self.folder, self.variants, self.skipped, target, **given)
        variants, ladder = self._judge()
        for note in (self.folder / KEY_FILE, *self.folder.glob(f"engines/*{NOTE}")):
            note.unlink()
        manifest = self._manifest(ladder).model_copy(update={"variants": variants})
        (self.folder / README_FILE).write_text(readme(manifest), encoding="utf-8")
        manifest = manifest.model_copy(update={"files": manifest.files | {README_FILE: file_entry(self.folder / README_FILE)}})
        (self.folder / MANIFEST_FILE).write_text(to_json(manifest), encoding="utf-8")
        return manifest

    def _add_graphs(self, sizes: Sequence[tuple[int, int]]) -> None:
        """The ONNX variants, those that are searched for, too."""
        (self.folder / "graphs").mkdir()
        with WeightFile(self.folder / "graphs" / "weights.bin") as weights:
            order, fingerprint = self.order, self.model.checkpoint
            traced = trace_all(self.pipeline, sizes, unroll=order.unroll, opset=order.opset, fingerprint=fingerprint)
            graphs, self.opset, self.opset_ms = traced.graphs, traced.opset, traced.opset_ms
            self._add_variant(graphs, default_recipe("fp32"), {}, weights)
            others = [recipe for recipe in self.order.recipes if recipe.name != "fp32"]
            needed = any(r.quantize in ("int8", "fp8") or (r.quantize and self.order.search) for r in others)
            observed = self._calibrate(graphs) if needed else {}
            for recipe in others:
                self._add_variant(graphs, recipe, observed, weights)
            if self.order.modelopt_python is not None:
                self._add_modelopt(graphs, others, self.order.modelopt_python, weights)
            if self.order.search:
                for recipe in others:
                    if recipe.quantize is not None:
                        self._search(graphs, recipe, observed, weights)

    def _add_variant(
        self,
        graphs: Graphs,
        recipe: Recipe,
        observed: dict[str, dict[str, Observed]],
        weights: WeightFile,
        make: Callable[[ir.Model, str], ir.Model] | None = None,
    ) -> None:
        """`make` takes a part's fp32 graph and its name, where the graph that follows the recipe is not ours to make."""
        files: dict[str, dict[str, str]] = {size: {} for size in graphs}
        audits = {}
        for size, of_size in graphs.items():
            for part, model in of_size.items():
                made = make(model, part) if make else apply(model, part, recipe, seen_by(model, part, observed))
                made.metadata_props["precision"] = recipe.name
                share = expected_share(model, part, recipe, parts=of_size)
                audits[part] = audit_graph(made, wanted_of(recipe, part), expected=share)
                if part == "step" or part.startswith(WHOLE):  # the others may hold no product that is large enough
                    check(audits[part], f"{part} of {recipe.name}")
                files[size][part] = f"graphs/{size}.{recipe.name}.{part}.onnx"
                save(made, self.folder / files[size][part], weights)
        logger.info("onnx-%s: %d graphs", recipe.name, sum(map(len, files.values())))
        self.variants[f"onnx-{recipe.name}"] = Variant(
            target="onnx", precision=recipe.name, recipe=recipe, parts=files, runs_on="any CPU", audit=audits
        )

    def _add_modelopt(self, graphs: Graphs, recipes: Sequence[Recipe], python: Path, weights: WeightFile) -> None:
        """A variant NAME-modelopt beside each that is quantised in 8 bits, of the same recipe.

        It runs step by step: a graph of a whole translation is never called in calibration."""
        called = {size: {part: graph for part, graph in of.items() if not part.startswith(WHOLE)} for size, of in graphs.items()}
        for recipe in recipes:
            if recipe.quantize in MODES:
                logger.info("%s: quantised by ModelOpt in %s", recipe.name, python)
                theirs = recipe.model_copy(update={"name": f"{recipe.name}-modelopt", "smooth": 0.0})

                def make(model: ir.Model, part: str, recipe: Recipe = theirs) -> ir.Model:
                    return apply_modelopt(model, part, recipe, self.recorded.get(part, []), python)

                self._add_variant(called, theirs, {}, weights, make)

    def _calibrate(self, graphs: Graphs) -> dict[str, dict[str, Observed]]:
        """By part and node. The calls come from translating real images, so every time of the table is among them."""
        logger.info("calibrating on %s", self.pictures.said)
        images = self.pictures.calibration
        calls = record(self._bundle(), REFERENCE, images, seeds=list(range(1000, 1000 + len(images)))).calls
        if self.order.modelopt_python is not None:
            self.recorded = calls
        self.calls = calls["step"][:: max(1, len(calls["step"]) // SEARCHED)]
        of_size = graphs[name_of(self.size)]
        return {
            part: observe(model, calls[part], nodes)
            for part, model in of_size.items()
            if (nodes := candidates(model)) and part in calls
        }

    def _search(self, graphs: Graphs, recipe: Recipe, observed: dict[str, dict[str, Observed]], weights: WeightFile) -> None:
        """A variant NAME-searched, where the one of a recipe is not good enough: with as few nodes kept as the budget allows.

        Only the step is searched; what every trial writes is there already, but for its graphs."""
        judge = self._judge_of(self._bundle())
        reference, budget = as_reference(judge.reference), self.order.budget
        reason = why_not_good(judge.quality(f"onnx-{recipe.name}"), reference, budget)
        if reason is None:
            return
        logger.info("%s: %s; searching for what to leave as it is", recipe.name, reason)
        model = graphs[name_of(self.size)]["step"]
        with tqdm(desc="nodes on their own", unit="node", disable=None) as bar:
            seen = observed.get("step", {})
            ranking = sensitivities(model, "step", recipe, seen, self.calls, tell=lambda _: bar.update())

        def is_good(found: Recipe) -> bool:
            trial = found.model_copy(update={"name": f"{recipe.name}-trial-{len(found.keep_half)}"})
            self._add_variant(graphs, trial, observed, weights)
            judge.bundle = self._bundle()
            quality = judge.quality(f"onnx-{trial.name}")
            for parts in self.variants.pop(f"onnx-{trial.name}").parts.values():
                for file in parts.values():
                    (self.folder / file).unlink()
            return why_not_good(quality, reference, budget) is None

        try:
            found = demote("step", recipe, ranking, is_good)
        except (ValueError, WrongPrecision) as error:
            self.skipped[f"onnx-{recipe.name}-searched"] = str(error)
            return
        self._add_variant(graphs, found.model_copy(update={"name": f"{recipe.name}-searched"}), observed, weights)

    def _write_recipes(self) -> None:
        """As files that `--recipe` reads again."""
        (self.folder / "recipes").mkdir()
        for variant in self.variants.values():
            text = variant.recipe.model_dump_json(indent=2, exclude_defaults=True) + "\n"
            (self.folder / "recipes" / f"{variant.recipe.name}.json").write_text(text, encoding="utf-8")

    def _add_openvino(self) -> None:
        """The graphs that there are, with the type that OpenVINO is to compute in."""
        graphs = {variant.precision: variant for variant in list(self.variants.values()) if variant.target == "onnx"}
        half = "bf16" if computes_bf16() else "fp32"
        for precision, variant in graphs.items():
            name, recipe = f"openvino-{precision}", variant.recipe
            if recipe.compute == "fp16" or (recipe.compute == "bf16" and half != "bf16"):
                self.skipped[name] = f"this CPU does not compute in {recipe.compute}"
                continue
            # OpenVINO lowers a graph by itself: it is given the fp32 one, or the quantised one
            graph = graphs["fp32"] if recipe.quantize is None else variant
            if recipe.quantize is not None:
                recipe = recipe.model_copy(update={"compute": half})
            self.variants[name] = graph.model_copy(
                update={
                    "target": "openvino",
                    "precision": precision,
                    "recipe": recipe,
                    "audit": {},
                    "runs_on": "any x86 or Arm CPU",
                }
            )

    def _judge(self) -> tuple[dict[str, Variant], list[str]]:
        """Variants with what was measured of them, and those that are worth opening, the first first."""
        bundle = self._bundle()
        judge = self._judge_of(bundle)
        quality: dict[str, Quality] = {}
        cannot: dict[str, str] = {}
        for name, variant in list(self.variants.items()):
            if runs_here(variant.target):
                logger.info("%s: judging its pictures", name)
                try:
                    self._audit_opened(bundle, name)
                    quality[name] = as_reference(judge.reference) if name == REFERENCE else judge.quality(name)
                except ValueError as error:  # a runtime may lack a kernel, or compute in something else
                    cannot[name] = str(error)
        logger.info("timing %d variants in turns", len(quality))
        speed = measure_speed(bundle, list(quality), self.pictures.sources, seconds=SECONDS)
        targets = {name: variant.target for name, variant in self.variants.items()}
        doubts = {name: reason for name, variant in self.variants.items() if (reason := doubt(variant)) is not None}
        trusted = {name: found for name, found in quality.items() if name not in doubts}
        ladder, reasons = choose(trusted, speed, targets, REFERENCE, self.order.budget)
        reasons |= doubts
        reasons |= {name: cannot.get(name, NOT_RUN) for name in self.variants if name not in quality}
        measured = {
            name: variant.model_copy(
                update={"quality": quality.get(name), "speed": speed.get(name), "not_default": reasons.get(name)}
            )
            for name, variant in self.variants.items()
        }
        return measured, ladder

    def _judge_of(self, bundle: Bundle) -> Judge:
        return Judge(bundle, self.pictures.sources, seeds=self.pictures.seeds, targets_u8=self.pictures.targets)

    def _audit_opened(self, bundle: Bundle, name: str) -> None:
        """WrongPrecision when a runtime turns a variant into something else than its name says."""
        with closing(open_variant(bundle, name)) as backend:
            found = backend.audit(name_of(self.size), "step")
        if found is not None:
            self.variants[name] = self.variants[name].model_copy(update={"audit": {"step": found}})
            check(found, f"step of {name}")

    def _bundle(self) -> Bundle:
        """What there is so far, opened like a finished one; its files were hashed just now."""
        manifest = self._manifest([REFERENCE])
        return Bundle(folder=self.folder, manifest=manifest, objective=self.objective, _seen=set(manifest.files))

    def _manifest(self, ladder: Sequence[str]) -> Manifest:
        files = sorted(
            path for path in self.folder.rglob("*") if path.is_file() and path.name != KEY_FILE and not path.name.endswith(NOTE)
        )
        return Manifest(
            format=FORMAT,
            name=self.name,
            model=self.model,
            max_batch=self.order.max_batch,
            variants=self.variants,
            default=ladder[0],
            ladder=tuple(ladder),
            files={path.relative_to(self.folder).as_posix(): self._entry(path) for path in files},
            calibration=self.pictures.said,
            skipped=self.skipped,
            opset=self.opset,
            opset_ms=self.opset_ms,
            versions=export_versions(),
            key=self.key,
        )

    def _entry(self, path: Path) -> File:
        """Hashed again only when it was written again: the weights can be gigabytes."""
        stat = path.stat()
        state = (str(path), stat.st_size, stat.st_mtime_ns)
        if state not in self._entries:
            self._entries[state] = file_entry(path)
        return self._entries[state]


def model_of(pipeline: ClipDiTPipeline, fingerprint: str) -> Model:
    dit, autoencoder, clip = pipeline.transformer, pipeline.autoencoder, pipeline.clip
    defaults = pipeline.sampling_defaults
    return Model(
        checkpoint=fingerprint,
        native_size=pipeline.native_size,
        multiple=autoencoder.downscale * dit.config["patch"],
        latent_channels=autoencoder.latent_channels,
        downscale=autoencoder.downscale,
        steps=defaults.steps,
        guidance=defaults.guidance,
        guidable=pipeline.config["guidable"],
        conditioning=dit.config["conditioning"],
        tokens=(clip.tokens if clip is not None else 0, dit.config["clip_token_width"]),
        pooled=dit.config["clip_embedding_width"],
    )
