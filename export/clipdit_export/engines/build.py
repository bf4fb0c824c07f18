"""The engines of a bundle: for every variant of graphs, one engine a part and size."""

import logging
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from clipdit.files import cache_home, write_atomically
from clipdit_export.audit import audit_engine, check, wanted_of
from clipdit_export.engines.api import EngineTarget, capabilities, capability_here, inspect
from clipdit_export.engines.builder import Built, EngineOptions, Flag, build_engine
from clipdit_export.engines.plan_text import products, weights
from clipdit_export.manifest import Audit, Variant

logger = logging.getLogger(__name__)

UNFIT = {"tensorrt-rtx": {"int8": "TensorRT-RTX has no 8-bit integer products; its GPUs take fp8, or int8-weights"}}
"""Precisions that a target cannot compute in, with the reason."""
NOTE = ".built.json"
"""After an engine's name, while the bundle is being built: its audit, and that it is whole."""


def audit(target: EngineTarget, built: Built, wanted: str, expected: float) -> Audit:
    """What an engine computes in: TensorRT's by its inspector, which needs the GPU that it was built on anyway; TensorRT-RTX's
    by the plan in it. Where neither can be read, what the builder was given, and the audit says so."""
    if target == "tensorrt":
        return audit_engine(inspect(target, built.data), wanted, expected=expected)
    found = products(built.data)
    return Audit(
        wanted=wanted,
        counts=dict(sorted((found or built.network).items())),
        expected=expected,
        weights=dict(sorted(weights(built.data).items())),
        read_from="engine" if found else "network",
    )


def add_engines(
    folder: Path,
    variants: dict[str, Variant],
    skipped: dict[str, str],
    target: EngineTarget,
    *,
    gpus: Sequence[str],
    max_batch: int,
    flags: Sequence[Flag] = (),
) -> None:
    """Build the engines of every ONNX variant in `folder` and put them into `variants`; what cannot be goes to `skipped`."""
    graphs = {name: variant for name, variant in variants.items() if variant.target == "onnx"}
    options = EngineOptions(
        batches=(1, min(4, max_batch), max_batch),
        gpus=tuple(capabilities(target, list(gpus))) if target == "tensorrt-rtx" else (),
        timing_cache=cache_home() / "tensorrt" / "timing.cache" if target == "tensorrt" else None,
        **dict.fromkeys(flags, True),
    )
    (folder / "engines").mkdir(exist_ok=True)
    total = sum(len(parts) for variant in graphs.values() for parts in variant.parts.values())
    with tqdm(total=total, desc=f"building {target} engines", unit="engine", disable=None) as bar:
        for variant in graphs.values():
            name = f"{target}-{variant.precision}"
            reason = UNFIT.get(target, {}).get(variant.recipe.quantize or "")
            if reason is not None:
                skipped[name] = reason
                continue
            files: dict[str, dict[str, str]] = {}
            audits: dict[str, Audit] = {}
            for size, parts in variant.parts.items():
                files[size] = {}
                for part, graph in parts.items():
                    file = f"engines/{size}.{name}.{part}.engine"
                    audits[part] = _one(folder, graph, file, target, options, variant, part)
                    files[size][part] = file
                    bar.update()
            served = [gpu.lower() for gpu in options.gpus] if target == "tensorrt-rtx" else [capability_here()]
            where = ", ".join(f"{gpu[2:-1]}.{gpu[-1]}" for gpu in served)
            variants[name] = variant.model_copy(
                update={
                    "target": target,
                    "parts": files,
                    "runs_on": f"GPUs of compute capability {where}",
                    "gpus": tuple(served),
                    "engine": tuple(flags),
                    "audit": audits,
                }
            )


def _one(folder: Path, graph: str, file: str, target: EngineTarget, options: EngineOptions, variant: Variant, part: str) -> Audit:
    """Build one engine, or take it over from an interrupted build of the same key: then its audit lies beside it."""
    noted = folder / f"{file}{NOTE}"
    if noted.exists() and (folder / file).exists():
        return Audit.model_validate_json(noted.read_bytes())
    built = build_engine(target, folder / graph, options, name=f"{variant.precision} {part}")
    found = audit(target, built, wanted_of(variant.recipe, part), _share(variant.audit[part]))
    if part == "step":
        check(found, f"{part} of {target}-{variant.precision}")
    (folder / file).write_bytes(built.data)
    write_atomically(noted, found.model_dump_json())  # last: it says that the engine is whole
    return found


def _share(graph: Audit) -> float:
    """Of a graph's products, those in what it was made for: what its engine is held to."""
    total = sum(graph.counts.values())
    return graph.counts.get(graph.wanted, 0) / total if total else 0.0
