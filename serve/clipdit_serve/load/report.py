"""A record of a load test as a table for a terminal, and as a plot."""

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from clipdit_serve.load.measuring import GROWTH, Record

LATE_SHARE = 0.1
"""Of a latency: when requests were sent later than this, the figures say as much about us as about the service."""

DRIFT = 1.25
"""When capacity after the rates differs so many times from that before them, something else has changed."""

COLOURS = {"p50": "C0", "p95": "C1", "p99": "C3"}


def heading(record: Record) -> str:
    """What was asked, and what it can."""
    service, found = record["service"], record["capacity"]
    how = ", ".join(filter(None, [service.get("backend"), service.get("precision")]))
    lines = [f"{service['model'] or 'the model'}{f' ({how})' if how else ''} at {service['url']}"]
    if found is not None:
        lines.append(f"{found['callers']} callers in a closed loop get {found['per_s']:.3g} answers a second")
    return "\n".join(lines)


COUNTS = "sent answered refused failed hung".split()
PERCENTILES = "p50 p95 p99".split()


def table(record: Record) -> str:
    """A line for each rate; times in milliseconds."""
    times = [f"{name} ms" for name in PERCENTILES]
    rows = [["offered/s", "answered/s", *COUNTS, *times[:-1], f"{times[-1]} ", *(f"refused {name}" for name in times)]]
    for found in record["levels"]:
        answered = _three(found["answered_ms"])
        answered[-1] += "*" if found["steady"] is False else " "
        rates = [f"{found[name]:.4g}" for name in ("offered_per_s", "answered_per_s")]
        rows.append([*rates, *(str(found[name]) for name in COUNTS), *answered, *_three(found["refused_ms"])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, *notes(record)])


def notes(record: Record) -> list[str]:
    """What a reader of the figures must know."""
    levels, lines, capacity = record["levels"], [], record["capacity"] or {}
    if "again_per_s" in capacity and not 1 / DRIFT < capacity["again_per_s"] / capacity["per_s"] < DRIFT:
        lines.append(
            f"not comparable: the closed loop gets {capacity['again_per_s']:.3g} answers a second after the rates, "
            f"{capacity['per_s']:.3g} before. The machine was busy with something else; measure again when it is quiet"
        )
    if any(found["steady"] is False for found in levels):
        lines.append(f"* not settled: the last third of the answers took {GROWTH:g} times as long as the third before, or longer")
    late = [
        found for found in levels if found["answered_ms"] and found["late_ms"]["p99"] > LATE_SHARE * found["answered_ms"]["p50"]
    ]
    if late:
        worst = max(late, key=lambda found: found["late_ms"]["p99"])
        lines.append(
            f"requests were sent {_plain(worst['late_ms']['p99'])} ms late (p99) at {worst['offered_per_s']:.4g}/s: this machine "
            "is too busy to ask in time. Latencies hold that time"
        )
    failures: dict[str, int] = {}
    for found in levels:
        for said, count in found["said"].items():
            if not said.startswith(("200 image/", "429")):
                failures[said] = failures.get(said, 0) + count
    return lines + [f"{count} times: {said}" for said, count in failures.items()]


def _three(values: Record | None) -> list[str]:
    return ["-"] * 3 if values is None else [_plain(values[name]) for name in PERCENTILES]


def _plain(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def plot(record: Record) -> bytes:
    """PNG: latency of answers above, shares of requests without one below, against the rate that was offered."""
    levels = record["levels"]
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 6.5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        _latency(above, [found for found in levels if found["answered_ms"]])
        _shares(below, levels)
        for axes in (above, below):
            axes.grid(alpha=0.3, which="both")
            if record["capacity"] is not None:
                axes.axvline(record["capacity"]["per_s"], color="0.4", linestyle="--", linewidth=1)
        if record["capacity"] is not None:
            label = f" {record['capacity']['per_s']:.3g}/s: a closed loop of {record['capacity']['callers']} callers"
            above.annotate(
                label, (record["capacity"]["per_s"], 1), xycoords=("data", "axes fraction"), xytext=(2, -11),
                textcoords="offset points", fontsize=8, color="0.3",
            )  # fmt: skip
        below.set_xlabel("requests offered a second")
        below.set_xlim(left=0)
        figure.suptitle(_title(record), fontsize=10)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=130)
        return stream.getvalue()


def _title(record: Record) -> str:
    service, machine = record["service"], record["provenance"]["hardware"]
    name = (service["model"] or "the model").partition("@")[0]
    how = f" on {service['backend']}" if service.get("backend") else ""
    where = (
        ", ".join([f"{machine['cores']} cores of {machine['cpu']}", *machine["gpus"]]) if service["started"] else service["url"]
    )
    return f"clipdit serve, {name}{how}: latency against load\n{where}"


def _latency(axes: Axes, levels: Sequence[Record]) -> None:
    rates = [found["offered_per_s"] for found in levels]
    for name, colour in COLOURS.items():
        axes.plot(
            rates, [found["answered_ms"][name] for found in levels], "o-", color=colour, label=f"answered, {name}", markersize=4
        )
    unsteady = [found for found in levels if found["steady"] is False]
    if unsteady:
        for name, colour in COLOURS.items():
            axes.plot(
                [found["offered_per_s"] for found in unsteady], [found["answered_ms"][name] for found in unsteady], "o",
                markerfacecolor="white", markeredgecolor=colour, markersize=5,
                label="still growing at the end" if name == "p50" else None,
            )  # fmt: skip
    refused = [found for found in levels if found["refused_ms"]]
    if refused:
        axes.plot(
            [found["offered_per_s"] for found in refused], [found["refused_ms"]["p99"] for found in refused], "s:", color="0.5",
            label="refused, p99", markersize=4,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms / 1000:g} s" if ms >= 1000 else f"{ms:g} ms"))
    axes.set_ylabel("latency, from the moment a request was due")
    if levels:
        axes.legend(fontsize=8)


def _shares(axes: Axes, levels: Sequence[Record]) -> None:
    rates = [found["offered_per_s"] for found in levels]
    for kind, look in {"refused": "C7s-", "failed": "C3^-", "hung": "C5D-"}.items():
        if kind == "refused" or any(found[kind] for found in levels):
            label = "refused (429)" if kind == "refused" else kind
            axes.plot(rates, [found[kind] / found["sent"] for found in levels], look, label=label, markersize=4)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("share of requests")
    axes.legend(fontsize=8)
