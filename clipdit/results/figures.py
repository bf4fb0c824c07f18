"""The figures of a comparison: the architecture as the code has it, loss curves, and unseen pairs side by side."""

import io
import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: it holds global state
from matplotlib.figure import Figure
from torch import nn

from clipdit.data.pairs import find_pairs
from clipdit.evaluate import choose, read_pairs
from clipdit.files import write_atomically
from clipdit.images import write_image
from clipdit.model.dit import DiT
from clipdit.pipeline import ClipDiTPipeline, load_checkpoint
from clipdit.results.comparison import Plan, Variant, evaluation_file, run_folder, variants
from clipdit.results.methods import METHODS
from clipdit.sheets import contact_sheet
from clipdit.train.record import read_history, smoothed
from clipdit.translator import Translator

ROWS = 8
INK, PALE, FILL = "#20303c", "#9db4c8", "#eef3f7"
COLOURS = ("#1f4e79", "#c0392b", "#2e8b57", "#8e5ea2", "#d98200", "#5d6d7e", "#16a085", "#7f4f24")


def draw_all(plan: Plan, out: Path, *, device: str | None = None) -> list[Path]:
    """Every figure that the folder has enough for; returns what was written."""
    done = [v for v in variants(plan) if evaluation_file(out, v, plan.seeds[0]).exists()]
    written = []
    for name in ("ours", "paper"):
        folder = run_folder(out, name, plan.seeds[0])
        if any(v.method == name for v in done):
            written.append(out / f"architecture-{name}.png")
            write_atomically(written[-1], _png(architecture(load_checkpoint(folder), METHODS[name].label)))
    methods = list(dict.fromkeys(v.method for v in done))
    if methods:
        written.append(out / "loss-curves.png")
        write_atomically(written[-1], _png(loss_curves({m: run_folder(out, m, plan.seeds[0]) for m in methods})))
        written += unseen_pairs(plan, out, [v for v in done if METHODS[v.method].role != "ablation"], device=device)
    return written


def unseen_pairs(plan: Plan, out: Path, shown: list[Variant], *, device: str | None = None) -> list[Path]:
    """source | each method | target on the first test pairs, which are in random order; and on those that the first of ours
    fails worst at."""
    if not shown:
        return []
    seed = plan.seeds[0]
    # one column a method, and the student's one step beside
    shown = [v for v in shown if v.steps is None]
    opened = {v: Translator.open(run_folder(out, v.method, seed), backend="eager", device=device) for v in shown}
    size = next(iter(opened.values())).native_size
    chosen = choose(find_pairs(plan.data, direction=plan.base.pairs.direction).split("test"), plan.limit)
    pairs = read_pairs(chosen, size)
    worst = _worst(evaluation_file(out, next((v for v in shown if v.method == "ours"), shown[-1]), seed), pairs.ids)
    written = []
    for name, indices in (("unseen-pairs", list(range(min(ROWS, len(pairs))))), ("failures", worst[:ROWS])):
        columns = {"source": pairs.sources[indices]}
        for variant, translator in opened.items():
            # the first sample of the evaluation: what the numbers were computed from
            columns[variant.label] = translator(pairs.sources[indices], seeds=list(indices))
        columns["target"] = pairs.targets[indices]
        written.append(out / f"{name}.png")
        write_image(written[-1], contact_sheet(columns, labels=[pairs.ids[i] for i in indices], tile_px=160))
    for translator in opened.values():
        translator.backend.close()
    return written


def _worst(report: Path, ids: list[str]) -> list[int]:
    """Pairs by how often they failed, then by distance, the worst first."""
    by_id = {image["id"]: image for image in json.loads(report.read_text(encoding="utf-8"))["by_image"]}

    def badness(i: int) -> tuple[float, float]:
        image = by_id.get(ids[i], {"failed_samples": {}, "mean": {}})
        return -sum(image["failed_samples"].values()), -(image["mean"].get("st_lpips_alex") or 0.0)

    return sorted(range(len(ids)), key=badness)


def loss_curves(runs: dict[str, Path]) -> Figure:
    """Every loss of every run, a row a run: smoothed, with the intervals pale behind."""
    histories = {name: read_history(folder) for name, folder in runs.items()}
    losses = {name: _losses(rows[-1]) for name, rows in histories.items() if rows}
    columns = max(len(names) for names in losses.values())
    figure = Figure(figsize=(3.1 * columns, 2.2 * len(losses)), layout="constrained")
    axes = figure.subplots(len(losses), columns, squeeze=False)
    for line, (name, names) in enumerate(losses.items()):
        for column, axis in enumerate(axes[line]):
            if column >= len(names):
                axis.set_axis_off()
                continue
            points = [(row["step"], row[names[column]]) for row in histories[name] if names[column] in row]
            steps, values = [p[0] for p in points], [p[1] for p in points]
            axis.plot(steps, values, color=PALE, linewidth=0.6)
            axis.plot(steps, smoothed(values), color=COLOURS[line % len(COLOURS)], linewidth=1.6)
            axis.set_title(f"{METHODS[name].label}: {names[column].removeprefix('loss/').replace('_', ' ')}", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
            if min(values) > 0 and max(values) > 10 * values[-1]:
                axis.set_yscale("log")
    figure.supxlabel("optimiser steps", fontsize=8)
    return figure


def _losses(row: dict[str, float]) -> list[str]:
    """The names of what is drawn: without the total, where it is the only loss there is."""
    names = [name for name in row if name.startswith("loss/")]
    return [name for name in names if name != "loss/total"] if len(names) == 2 else names


def architecture(pipeline: ClipDiTPipeline, title: str) -> Figure:
    """Figure 1: the parts of a checkpoint and what goes from one to the other, with the numbers that the code has."""
    dit, autoencoder = pipeline.transformer, pipeline.autoencoder
    assert isinstance(dit, DiT)
    config, (height, width) = dict(dit.config), pipeline.native_size
    cells = (autoencoder.latent_channels, height // autoencoder.downscale, width // autoencoder.downscale)
    tokens = cells[1] * cells[2] // config["patch"] ** 2
    figure = Figure(figsize=(11, 4.6))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 110), ylim=(0, 46))
    axis.set_axis_off()
    axis.text(2, 43.5, f"{title}: {_millions(dit)} parameters in the DiT", fontsize=12, color=INK, weight="bold")
    latent = " x ".join(map(str, cells))
    _box(axis, 2, 17, 13, 9, "source", f"{width} x {height} px")
    vae = type(pipeline.vae).__name__
    if dit.reads_latent:
        _box(axis, 21, 8, 19, 9, "VAE encoder", f"{vae}\nlatent {latent}")
        _arrow(axis, (15, 20), (21, 13))
    if pipeline.clip is not None:
        clip = pipeline.clip
        said = f"{clip.tokens} tokens of {clip.token_width}\nembedding of {clip.embedding_width}"
        _box(axis, 21, 27, 19, 9, "CLIP image encoder", said)
        _arrow(axis, (15, 23), (21, 30))
    crossing = sum(block.cross is not None for block in dit.blocks)
    heads = f"width {config['width']}, {config['heads']} heads, MLP x {config['mlp_ratio']:g}"
    norm = "RMSNorm" if config["norm"] == "rms" else "LayerNorm"
    inside = f"{heads}\n{norm} with adaLN, {'rotary' if config['positions'] == 'rope' else 'sin-cos'} positions"
    inside += f"\ncross-attention in {crossing}" if crossing else "\nno cross-attention"
    inside += "\nQK-norm" if config["qk_norm"] else ""
    _box(axis, 54, 13, 24, 17, f"DiT: {config['depth']} blocks", inside)
    if dit.reads_latent:
        _arrow(axis, (40, 12.5), (54, 18), "added to\nthe tokens")
    if crossing:
        _arrow(axis, (40, 30), (54, 25), "keys, values")
    if dit.reads_clip:
        _arrow(axis, (40, 34), (62, 30), "adaLN, with the time")
    _box(axis, 54, 1, 24, 7, "x", f"{latent} from noise, {tokens} tokens")
    _arrow(axis, (66, 8), (66, 13))
    steps = pipeline.sampling_defaults.steps
    kind = {"FlowMatching": "velocity", "DDPM": "noise"}[type(pipeline.objective).__name__]
    guided = pipeline.sampling_defaults.guidance
    loop = f"{kind}; {steps} steps of {pipeline.objective.solver}" + (f"\nguidance {guided:g}" if guided != 1 else "")
    turn = {"arrowstyle": "-|>", "color": INK, "connectionstyle": "arc3,rad=-0.6", "shrinkA": 4, "shrinkB": 4}
    axis.annotate("", xy=(78, 4.5), xytext=(78, 15.5), arrowprops=turn)
    axis.text(83, 8, loop, fontsize=8.5, color=INK)
    _box(axis, 84, 17, 14, 9, "VAE decoder", vae)
    _arrow(axis, (78, 21.5), (84, 21.5))
    _arrow(axis, (98, 21.5), (103, 21.5))
    axis.text(103.5, 20.8, "image", fontsize=10, color=INK)
    return figure


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"


def _box(axis: Axes, x: float, y: float, width: float, height: float, title: str, text: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.4", facecolor=FILL, edgecolor=INK, linewidth=1.1))
    axis.text(x + width / 2, y + height - 1.2, title, fontsize=10, color=INK, weight="bold", ha="center", va="top")
    axis.text(x + width / 2, y + height - 4.2, text, fontsize=8, color=INK, ha="center", va="top")


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": INK, "shrinkA": 3, "shrinkB": 3})
    if text:
        axis.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 1, text, fontsize=7.5, color=INK, ha="center")


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()
