"""What a comparison found, as JSON and as Markdown."""

import json
import statistics
import warnings
from pathlib import Path
from typing import Any

from clipdit.experiment import EXPERIMENT_FILE
from clipdit.provenance import provenance
from clipdit.results.comparison import Plan, Variant, evaluation_file, evaluations, run_folder
from clipdit.results.cost import read as cost_in
from clipdit.results.methods import METHODS
from clipdit.train.state import read_progress

FORMAT = "clipdit-results-1"

COLUMNS: dict[str, tuple[tuple[str, ...], str, int]] = {
    "KID": (("realism", "kid_efficientnet_lite0", "mean"), ".3f", -1),
    "FD": (("realism", "fd_efficientnet_lite0", "value"), ".0f", -1),
    "edge F1": (("faithfulness", "edge_f1"), ".2f", 1),
    "CLIP to source": (("faithfulness", "clip_similarity_to_source"), ".3f", 1),
    "PSNR": (("distance_to_target", "psnr_db", "mean"), ".1f", 1),
    "best PSNR": (("distance_to_target", "psnr_db", "best"), ".1f", 1),
    "SSIM": (("distance_to_target", "ssim", "mean"), ".2f", 1),
    "ST-LPIPS": (("distance_to_target", "st_lpips_alex", "mean"), ".3f", -1),
    "best ST-LPIPS": (("distance_to_target", "st_lpips_alex", "best"), ".3f", -1),
    "LPIPS": (("distance_to_target", "lpips_alex", "mean"), ".3f", -1),
    "CLIP to target": (("distance_to_target", "clip_similarity_to_target", "mean"), ".3f", 1),
    "spread": (("diversity", "pairwise_st_lpips_alex"), ".3f", 0),
    "failed": (("failures", "any"), ".0f", -1),
}
"""Heading -> where it stands in a row of an evaluation, how it is written, and whether more (1) or less (-1) is better."""

FLOORS = {
    "autoencoded": "the real targets through the VAE",
    "copy_source": "copy of the source",
    "mean_target": "mean training target",
    "real": "the real targets",
}


def results(plan: Plan, out: Path, failed: dict[str, str]) -> dict[str, Any]:
    """Everything, ready for json.dumps: the plan, and of each row the values by seed."""
    cost = cost_in(out)
    rows: list[dict[str, Any]] = []
    last: list[dict] = []
    floors: dict[str, dict] = {}  # an evaluation that has the row: only models on latents have a VAE
    for variant, reports in evaluations(plan, out):
        last = reports
        floors |= {name: reports[0] for name in FLOORS if name in reports[0]["rows"]}
        row: dict[str, Any] = {"name": variant.name, "label": variant.label, "role": METHODS[variant.method].role}
        row |= {"about": METHODS[variant.method].about, "training": _trainings(plan, variant, out)}
        row["cost"] = cost["cost"].get(variant.name)
        row["values"] = {heading: _values(reports, "model", path) for heading, (path, _, _) in COLUMNS.items()}
        row["of"] = reports[0]["rows"]["model"]["failures"]["of"]
        rows.append(row)
    for name, label in FLOORS.items():
        if name in floors:
            values = {heading: _values([floors[name]], name, path) for heading, (path, _, _) in COLUMNS.items()}
            rows.append({"name": name, "label": label, "role": "floor", "values": values, "of": len(floors[name]["by_image"])})
    protocol = last[0]["protocol"] if last else {}
    plain = {"format": FORMAT, **provenance(), "plan": plan.to_json(), "protocol": protocol, "failed": failed, "rows": rows}
    plain |= {"against_ours": against_ours(rows), "cost_device": cost["device"]}
    return plain


def against_ours(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Each trained row minus ours, over seeds: name -> heading -> difference of the means, low, high.

    The interval is that of Student's t at 95 %, by Welch (1947) where both have several seeds. A row of one seed is taken to vary
    as ours does. Nothing where ours has one seed, or no seed differs from another (no sample failed, say). Intervals are of one
    comparison each, not of all of them together."""
    from scipy.stats import ttest_ind  # of the extra `metrics`, which the evaluations needed

    ours = next((row["values"] for row in rows if row["name"] == "ours"), {})
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["role"] in ("ours", "floor"):
            continue
        for heading, values in row["values"].items():
            if values and len(ours.get(heading, ())) > 1 and (len(set(values)) > 1 or len(set(ours[heading])) > 1):
                with warnings.catch_warnings():  # scipy warns where one of the two does not vary, which is exact here
                    warnings.simplefilter("ignore", RuntimeWarning)
                    test = ttest_ind(values, ours[heading], equal_var=len(values) == 1)
                low, high = test.confidence_interval(0.95)
                difference = statistics.mean(values) - statistics.mean(ours[heading])
                found.setdefault(row["name"], {})[heading] = {"difference": difference, "low": float(low), "high": float(high)}
    return found


def _values(reports: list[dict], row: str, path: tuple[str, ...]) -> list[float]:
    """The value in each report that has one."""
    found = []
    for report in reports:
        value: Any = report["rows"].get(row, {})
        for word in path:
            value = value.get(word) if isinstance(value, dict) else None
        if value is not None:
            found.append(value)
    return found


def _trainings(plan: Plan, variant: Variant, out: Path) -> list[dict[str, float]]:
    """How far the runs came. Their time is that of steps: what is read and cached before counts for none."""
    done = (seed for seed in plan.seeds_of(variant.method) if evaluation_file(out, variant, seed).exists())
    return [_training(variant, seed, out) for seed in done]


def _training(variant: Variant, seed: int, out: Path) -> dict[str, float]:
    folder = run_folder(out, variant.method, seed)
    progress = read_progress(folder)
    batch = json.loads((folder / EXPERIMENT_FILE).read_text(encoding="utf-8"))["train"]["batch_size"]
    return {"seed": seed, "steps": progress.step, "images": progress.step * batch, "minutes": progress.seconds / 60}


def markdown(plain: dict[str, Any]) -> str:
    """The tables, with what a reader must know to believe them."""
    plan, rows = plain["plan"], plain["rows"]
    seeds = plan["seeds"]
    shown = [heading for heading in COLUMNS if any(row["values"][heading] for row in rows)]
    best = {heading: _best(rows, heading) for heading in shown}
    quality = [[row["label"], *(_cell(row, heading, best[heading]) for heading in shown)] for row in rows]
    cpu = plain["hardware"]
    machine = ", ".join(cpu["gpus"]) or f"{cpu['cpu']}, {cpu['cores']} cores"
    protocol = plain["protocol"]
    size = protocol.get("size_px", ["?", "?"])
    about = [f"- **{row['label']}**: {row['about']}" for row in rows if row["name"] in METHODS]
    spread = "mean ± standard deviation over seeds" if len(seeds) > 1 else "one seed, so without an interval"
    if len(seeds) > (fewer := plan["ablation_seeds"]) and any(row["role"] == "ablation" for row in rows):
        spread += "; ablations of the first alone" if fewer == 1 else f"; ablations of the first {fewer}"
    parts = [
        f"# {plan['data']}: the comparison",
        f"{plan['minutes']:g} minutes of training each on {machine}, {protocol.get('pairs', '?')} unseen pairs at {size[1]} x "
        f"{size[0]} px, {plan['best_of']} samples a source; seeds {', '.join(map(str, seeds))}: {spread}. The best of what was "
        "trained is bold. Every metric: docs/metrics.md.",
        _table(["", *shown], quality),
        "\n".join(about),
        *_against_ours(plain, shown),
        "What it costs, to train (each seed) and to translate one image alone, pixels to pixels: median of turns (10th to 90th "
        "percentile). Parameters are of all networks that take part in a translation, operations those of PyTorch's counter.",
        _table(list(_COST), [_cost(row) for row in rows if "training" in row]),
    ]
    if plain["failed"]:
        parts.append("Not done: " + "; ".join(f"{name}: {reason}" for name, reason in plain["failed"].items()))
    return "\n\n".join(parts) + "\n"


def _against_ours(plain: dict[str, Any], shown: list[str]) -> list[str]:
    """The paragraph and the table of intervals; nothing where ours has one seed."""
    found, labels = plain["against_ours"], {row["name"]: row["label"] for row in plain["rows"]}
    if not found:
        return []
    about = (
        "Each minus ours, with the 95 % interval over seeds (Student's t, Welch's where both have several seeds; a row of one "
        "seed is taken to vary as ours does). Bold where the interval leaves out zero. The unseen pairs are the same for all: "
        "how much others would change is not in it."
    )
    lines = []
    for name, differences in found.items():
        cells = []
        for heading in shown:
            cell = differences.get(heading)
            cells.append(_difference(cell, COLUMNS[heading][1]) if cell else "")
        lines.append([labels[name], *cells])
    return [about, _table(["", *shown], lines)]


def _difference(cell: dict[str, float], form: str) -> str:
    text = f"{cell['difference']:+{form}} ({cell['low']:+{form}} to {cell['high']:+{form}})"
    return f"**{text}**" if cell["low"] > 0 or cell["high"] < 0 else text


_COST = ("", "steps trained", "images", "minutes", "parameters", "GFLOP an image", "ms an image")


def _cost(row: dict[str, Any]) -> list[str]:
    runs, cost = row["training"], row["cost"]
    cells = [
        " / ".join(format(run[what], form) for run in runs)
        for what, form in (("steps", ","), ("images", ","), ("minutes", ".1f"))
    ]
    if cost is None:
        return [row["label"], *cells, "", "", ""]
    time = cost["ms_per_image"]
    spent = [f"{cost['parameters'] / 1e6:.1f} M", f"{cost['gflop_per_image']:.1f}"]
    return [row["label"], *cells, *spent, f"{time['median']:.0f} ({time['low']:.0f} to {time['high']:.0f})"]


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def _best(rows: list[dict[str, Any]], heading: str) -> str | None:
    """The name of the row that is ahead; floors take no part."""
    direction = COLUMNS[heading][2]
    trained = [row for row in rows if row["role"] != "floor" and row["values"][heading]]
    values = {row["name"]: statistics.mean(row["values"][heading]) for row in trained}
    return max(values, key=lambda name: direction * values[name]) if values and direction else None


def _cell(row: dict[str, Any], heading: str, best: str | None) -> str:
    values, form = row["values"][heading], COLUMNS[heading][1]
    if not values:
        return ""
    text = format(statistics.mean(values), form)
    if len(values) > 1:
        text += f" ± {format(statistics.stdev(values), form)}"
    if heading == "failed":
        text += f"/{row['of']}"
    return f"**{text}**" if row["name"] == best else text
