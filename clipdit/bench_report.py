"""What `clipdit bench` measured, as a table and as a plot of time against what is lost."""

import base64
import io
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clipdit.bench import Bench, Entry
from clipdit.provenance import provenance


def table(bench: Bench) -> str:
    """A line for each candidate; times with their 95th percentile."""
    if not bench.entries:
        return "nothing was measured"
    sizes = sorted({size for entry in bench.entries for size in entry.images_per_s})
    width = max(len(entry.label) for entry in bench.entries)
    head = f"{'':{width}}  {'ms/image':>9} {'p95':>8} {'speed':>6} {'encode':>7} {'step':>7} {'decode':>7}"
    head += "".join(f" {f'img/s of {size}':>11}" for size in sizes) + f" {'first s':>8} {'MiB':>6} {'PSNR':>6} {'ST-LPIPS':>9}"
    return "\n".join([head, *(_row(entry, bench.entries[0], sizes, width) for entry in bench.entries)])


def _row(entry: Entry, first: Entry, sizes: list[int], width: int) -> str:
    distance = entry.to_reference.st_lpips_alex
    figures = f"{entry.label:{width}}  {entry.image.median:9.1f} {entry.image.p95:8.1f} "
    figures += f"{first.image.median / entry.image.median:6.2f} {entry.encode.median:7.2f} {entry.evaluation.median:7.2f} "
    figures += f"{entry.decode.median:7.2f}"
    figures += "".join(f" {entry.images_per_s[size]:11.1f}" if size in entry.images_per_s else f" {'-':>11}" for size in sizes)
    return figures + (
        f" {entry.first_image_s:8.1f} {entry.peak_memory_mib:6.0f} {entry.to_reference.psnr_db:6.1f} "
        f"{'-' if distance is None else f'{distance:.4f}':>9}"
    )


def pareto_png(bench: Bench) -> bytes:
    """Time of one image against the distance of its pictures to the reference's; those that no other beats in both are joined."""
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        axes = figure.add_subplot()
        points = [(e.image.median, e.to_reference.st_lpips_alex or 0.0, e) for e in bench.entries]
        best = [p for p in points if not any(o[0] <= p[0] and o[1] <= p[1] and o[:2] != p[:2] for o in points)]
        best.sort(key=lambda p: p[:2])
        axes.plot([x for x, _, _ in best], [y for _, y, _ in best], "-", color="0.75", zorder=1)
        for (x, y, entry), look in zip(points, _looks(), strict=False):
            axes.plot([x], [y], linestyle="", label=entry.label, **look)
            axes.hlines(y, entry.image.low, entry.image.high, color=look["color"], alpha=0.5)
        axes.set_xlabel(f"milliseconds for one image, {bench.protocol['steps']} steps (median; bar: 10th to 90th percentile)")
        axes.set_ylabel("ST-LPIPS to the images of the first")
        axes.set_xlim(left=0)
        figure.legend(loc="outside right upper", fontsize=8)
        return _png(figure)


def cost_png(bench: Bench) -> bytes:
    """Milliseconds for an image against the images in a call, and against the steps of the solver."""
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(12, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for entry, look in zip(bench.entries, _looks(), strict=False):
            by_size = {1: entry.image.median} | {size: 1000 / rate for size, rate in entry.images_per_s.items()}
            by_steps = {int(str(bench.protocol["steps"])): entry.image.median} | entry.image_ms_by_steps
            left.plot(*zip(*sorted(by_size.items()), strict=True), label=entry.label, **look)
            right.plot(*zip(*sorted(by_steps.items()), strict=True), **look)
        left.set_xlabel(f"images in a call, {bench.protocol['steps']} steps")
        right.set_xlabel("steps, one image")
        for axes in (left, right):
            axes.set_ylabel("milliseconds for an image (median)")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside right upper", fontsize=8)
        return _png(figure)


def _looks() -> Iterator[dict[str, Any]]:
    """Colours and marks, as many different ones as there will ever be candidates."""
    for mark in "osD^vP*":
        for i in range(10):
            yield {"color": f"C{i}", "marker": mark}


def html(bench: Bench, pictures: Sequence[tuple[str, bytes]]) -> str:
    """One page with the table, what could not run, how it was measured, and `pictures` (caption, PNG) inside."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("clipdit") / "assets" / "bench.html.j2").read_text("utf-8"))
    sizes = sorted({size for entry in bench.entries for size in entry.images_per_s})
    inline = [(caption, base64.b64encode(png).decode()) for caption, png in pictures]
    return template.render(bench=bench, sizes=sizes, provenance=provenance(), pictures=inline)


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()
