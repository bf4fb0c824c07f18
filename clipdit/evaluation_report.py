"""An evaluation as a person or a program reads it: a dict for JSON, a table of one screen, warnings, a contact sheet."""

import math
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from clipdit.evaluate import SEED_STRIDE, Evaluation, Row
from clipdit.metrics.compare import HIGHER_IS_NEARER
from clipdit.metrics.distribution import frechet_distance, kid
from clipdit.metrics.failures import Appearance
from clipdit.provenance import provenance
from clipdit.sheets import contact_sheet

FORMAT = "clipdit-evaluation-1"

EDGES = ("edge_precision", "edge_recall", "edge_f1", "edge_f1_other_source")
CLIP_SOURCE, CLIP_TARGET = "clip_similarity_to_source", "clip_similarity_to_target"

FEW_IMAGES = 50
"""Below this many held-out pairs KID and FD say little."""


def as_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Everything, ready for json.dumps: provenance, protocol, one entry a row, and the model's values image by image."""
    evaluator, judges = evaluation.evaluator, evaluation.evaluator.judges
    pairs = evaluator.pairs
    missing = dict(judges.missing)
    if judges.features is None or len(pairs) < 2:
        reason = missing.pop("efficientnet_lite0", f"{len(pairs)} held-out pairs; wanted at least 2")
        missing |= {"kid_efficientnet_lite0": reason, "fd_efficientnet_lite0": reason}
    height, width = pairs.sources.shape[-2:]
    return {
        "format": FORMAT,
        **provenance(),
        "protocol": {
            "pairs": len(pairs),
            "size_px": [height, width],
            "samples_per_source": evaluation.samples,
            "first_seed": evaluation.first_seed,
            "seed_rule": f"sample k of source i: first_seed + k * {SEED_STRIDE} + i",
            "sources_are_drawings": evaluator.drawings,
            "faithfulness": evaluator.faithfulness,
            "edge_tolerance_px": evaluator.given.tolerance_px,
            "training_targets": len(evaluator.real_appearance.contrast) if evaluator.training_features is not None else 0,
        },
        "networks": judges.networks,
        "missing": missing,
        "problems": pairs.problems,
        "warnings": warnings(evaluation),
        "rows": {name: row_dict(evaluation, name) for name in evaluation.rows},
        "seconds": {
            "translate": round(evaluation.translate_s, 3),
            "translate_per_image": _rounded(evaluation.translate_s / max(1, evaluation.samples * len(pairs))),
            "metrics": round(evaluation.metrics_s, 3),
        },
        "by_image": _by_image(evaluation),
    }


def row_dict(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """One row: realism, faithfulness, distance, diversity, appearance, failures. What was not measured is absent."""
    row = evaluation.rows[name]
    distance = {}
    for metric in row.values:
        if metric in HIGHER_IS_NEARER or metric in evaluation.evaluator.judges.perceptual:
            distance[metric] = {"mean": _rounded(row.mean(metric))}
            if row.values[metric].shape[1] > 1:
                distance[metric]["best"] = _rounded(float(row.best(metric).mean()))
    diversity = {metric: _rounded(row.mean(metric)) for metric in row.values if metric.startswith("pairwise_")}
    found: dict[str, Any] = {
        "realism": _realism(evaluation, name),
        "faithfulness": _faithfulness(evaluation, row),
        "distance_to_target": distance,
        "diversity": diversity,
        "appearance": row.appearance.summary(),
        "failures": {
            **{kind: int(flags.sum()) for kind, flags in row.failed.items()},
            "any": int(_any_failure(row).sum()),
            "of": row.values["edge_f1"].numel(),
        },
        "hues": {hue: asdict(seen) for hue, seen in evaluation.hues.items()} if name == "autoencoded" else {},
    }
    return {part: content for part, content in found.items() if content}


def _realism(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """KID and FD of the row's features against the held-out targets'; for `real`, those of training targets."""
    evaluator = evaluation.evaluator
    targets = evaluator.target_features
    features = evaluator.training_features if name == "real" else evaluation.rows[name].features
    if features is None or targets is None or min(len(features), len(targets)) < 2:
        return {}
    kernel = kid(features, targets)
    same = min(len(features), len(targets))  # FD depends on the number of images, so all rows get the same
    return {
        "kid_efficientnet_lite0": {
            "mean": _rounded(kernel.mean),
            "subset_std": _rounded(kernel.std),
            "subset_size": kernel.subset_size,
        },
        "fd_efficientnet_lite0": {"value": _rounded(frechet_distance(features[:same], targets)), "images": same},
    }


def _faithfulness(evaluation: Evaluation, row: Row) -> dict[str, float | None]:
    mode = evaluation.evaluator.faithfulness
    wanted = (EDGES if mode in ("edges", "both") else ()) + ((CLIP_SOURCE,) if mode in ("clip", "both") else ())
    return {metric: _rounded(row.mean(metric)) for metric in wanted if metric in row.values}


def _any_failure(row: Row) -> Tensor:
    return torch.stack(list(row.failed.values())).any(dim=0)


def _by_image(evaluation: Evaluation) -> list[dict[str, Any]]:
    row = evaluation.rows.get("model")
    if row is None:
        return []
    images = []
    for i, name in enumerate(evaluation.evaluator.pairs.ids):
        failed = {kind: int(flags[i].sum()) for kind, flags in row.failed.items() if flags[i].any()}
        values = {metric: _rounded(float(value[i].mean())) for metric, value in row.values.items()}
        images.append({"id": name, "mean": values, "failed_samples": failed})
    return images


def warnings(evaluation: Evaluation) -> list[str]:
    """What a reader must know before believing the numbers, and what is wrong with the outputs as a set. One line each."""
    n = len(evaluation.evaluator.pairs)
    found = [f"{n} held-out pairs: KID and FD say little below {FEW_IMAGES}"] if n < FEW_IMAGES else []
    turned = [f"{name} comes back {seen.came_back}" for name, seen in evaluation.hues.items() if seen.turned]
    if turned:
        kept = f"the model's autoencoder does not keep the targets' colours: {', '.join(turned)}"
        found.append(f"{kept}; the rest of the model cannot make up for it")
    row = evaluation.rows.get("model")
    if row is None:
        return found
    ours, real = row.appearance, evaluation.evaluator.own_appearance
    for name, word in (("contrast", "washed out"), ("chroma", "greyish"), ("sharpness", "blurred")):
        got, wanted = float(getattr(ours, name).mean()), float(getattr(real, name).mean())
        if got < 0.7 * wanted:
            found.append(f"outputs are {word}: mean {name} {got:.1f}, targets {wanted:.1f}")
    shift = ours.colour.mean(dim=0) - real.colour.mean(dim=0)
    if shift.abs().max() > max(6.0, 3 * _standard_error(real)):
        red, green, blue = shift.tolist()
        found.append(f"colours are shifted: outputs minus targets {red:+.0f} red, {green:+.0f} green, {blue:+.0f} blue of 255")
    ignored = int(row.failed["ignored_source"].sum())
    if ignored > 0.1 * row.failed["ignored_source"].numel():
        found.append(f"{ignored} of {row.failed['ignored_source'].numel()} outputs follow their source no better than others'")
    return found


def _standard_error(appearance: Appearance) -> float:
    """Of the mean colour, levels: how far the mean of that many real images wanders by chance."""
    return float(appearance.colour.std(dim=0, correction=0).max()) / math.sqrt(len(appearance.colour))


def table(evaluation: Evaluation) -> str:
    """The rows side by side, a screen wide. A dash is what was not measured or has no meaning in that row."""
    rows = {name: row_dict(evaluation, name) for name in evaluation.rows}
    samples = max(evaluation.samples, 1)
    columns = {
        "KID": ("realism", "kid_efficientnet_lite0", "mean", ".3f"),
        "FD": ("realism", "fd_efficientnet_lite0", "value", ".0f"),
        "edge P": ("faithfulness", "edge_precision", None, ".2f"),
        "edge R": ("faithfulness", "edge_recall", None, ".2f"),
        "edge F1": ("faithfulness", "edge_f1", None, ".2f"),
        "other F1": ("faithfulness", "edge_f1_other_source", None, ".2f"),
        "CLIP src": ("faithfulness", CLIP_SOURCE, None, ".3f"),
        "PSNR": ("distance_to_target", "psnr_db", "mean", ".1f"),
        f"best/{samples}": ("distance_to_target", "psnr_db", "best", ".1f"),
        "SSIM": ("distance_to_target", "ssim", "mean", ".2f"),
        "ST-LPIPS": ("distance_to_target", "st_lpips_alex", "mean", ".3f"),
        f"best/{samples} ": ("distance_to_target", "st_lpips_alex", "best", ".3f"),
        "LPIPS": ("distance_to_target", "lpips_alex", "mean", ".3f"),
        "CLIP tgt": ("distance_to_target", CLIP_TARGET, "mean", ".3f"),
        "spread": ("diversity", "pairwise_st_lpips_alex", None, ".3f"),
        "failed": ("failures", "any", None, "d"),
    }

    def cell(row: dict, part: str, metric: str, key: str | None, form: str) -> str:
        value = row.get(part, {}).get(metric)
        value = value.get(key) if isinstance(value, dict) else value
        if value is None:
            return "-"
        return f"{value}/{row['failures']['of']}" if metric == "any" else format(value, form)

    lines = [["", *columns]] + [[name, *(cell(row, *where) for where in columns.values())] for name, row in rows.items()]
    kept = [i for i in range(len(lines[0])) if i == 0 or any(line[i] != "-" for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in kept}
    return "\n".join("  ".join(line[i].ljust(widths[i]) if i == 0 else line[i].rjust(widths[i]) for i in kept) for line in lines)


def sheet(evaluation: Evaluation, *, title: str = "", rows: int = 12) -> UInt8[Tensor, "3 H W"]:
    """source | output | further seeds | target, for the first pairs: they are in random order, so nobody picked them."""
    pairs = evaluation.evaluator.pairs
    shown = min(rows, len(pairs), *(len(images) for images in evaluation.examples.values()))
    columns = {"source": pairs.sources[:shown], **evaluation.examples, "target": pairs.targets[:shown]}
    columns = {heading: list(images)[:shown] for heading, images in columns.items()}
    tile_px = max(128, min(256, pairs.sources.shape[-1]))
    return contact_sheet(columns, labels=pairs.ids[:shown], title=title, tile_px=tile_px, blocks=2 if shown > 4 else 1)


def _rounded(value: float) -> float | None:
    """Five significant digits; JSON has no nan, so that becomes null."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
