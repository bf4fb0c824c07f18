"""A record as tables in Markdown, which a terminal shows as well, and as a plot."""

import io
from collections.abc import Iterator

import matplotlib
from matplotlib.figure import Figure

from clipdit.model.dit import SIZES
from clipdit_kernels.benchmark.cases import OTHER_OURS, OURS
from clipdit_kernels.benchmark.ledger import Record, stale

TICKS = [n * 10**power for power in range(-2, 4) for n in (1, 2, 5)]
REFERENCE = {"sampling": "eager", "kernels": OURS}
"""Without which a record has nothing to be compared with."""


def heading(record: Record) -> str:
    """Which hardware, when, and whether it is still true."""
    made, limits = record["provenance"], record.get("ceilings")
    lines = [
        f"Measured on {record['device']}, {made['date'][:10]}; torch {made['versions']['torch']}, triton {record['triton']}; "
        f"kernels {record['source'][:12]}"
    ]
    if stale(record):
        lines.append("**Stale: the kernels have changed since.** Measure again before you rely on these numbers.")
    if limits is not None:
        rates = ", ".join(
            f"{rate / 1e12:.0f} T{'OP' if name == 'int8' else 'FLOP'}/s {name}" for name, rate in limits["flop_per_s"].items()
        )
        lines.append(f"Copy {limits['bytes_per_s'] / 1e12:.2f} TB/s, {rates}, {limits['node_us']:.2f} µs a node of a graph")
    return "\n".join(lines)


def table(record: Record) -> str:
    """All entries; times are medians (10th to 90th percentile)."""
    rows = [KERNEL_HEAD, *map(_kernel_row, _sorted(record))] if record["kind"] == "kernels" else list(_sampling_rows(record))
    return _markdown(rows)


def _sorted(record: Record) -> list[Record]:
    """Its entries, in whatever order they were measured: operations as they came, then by model, tokens and images."""
    operations = list(dict.fromkeys(entry.get("operation") for entry in record["entries"]))
    models = list(SIZES)
    return sorted(
        record["entries"],
        key=lambda entry: (
            operations.index(entry.get("operation")), models.index(entry["size"]), entry["tokens"], entry["images"]
        ),
    )  # fmt: skip


KERNEL_HEAD = [
    "operation",
    "model",
    "tokens",
    "images",
    "ours, µs",
    "error",
    "rate",
    "of the floor",
    "fastest peer",
    "µs",
    "error",
    "ours is",
]


def fastest_peer(entry: Record) -> str | None:
    """By name; None where no peer ran."""
    others = {name: timed["us"]["median"] for name, timed in entry["rivals"].items() if name not in (OURS, *OTHER_OURS)}
    return min(others, key=lambda name: others[name]) if others else None


def wins(entry: Record) -> bool | None:
    """Whether ours is faster than the fastest peer, or slower, by more than the spread of either (10th to 90th percentile); None:
    by less, or no peer ran."""
    peer = fastest_peer(entry)
    if peer is None:
        return None
    ours, other = (entry["rivals"][name]["us"] for name in (OURS, peer))
    margin = max(us["high"] - us["low"] for us in (ours, other))
    return None if abs(ours["median"] - other["median"]) <= margin else ours["median"] < other["median"]


def _kernel_row(entry: Record) -> list[str]:
    ours, peer = entry["rivals"][OURS], fastest_peer(entry)
    us = ours["us"]
    rate = f"{entry['bytes_moved'] / us['median'] / 1e6:.2f} TB/s"
    if entry["flops"]:
        rate += f", {entry['flops'] / us['median'] / 1e6:.0f} T{'OP' if entry['factors'] == 'int8' else 'FLOP'}/s"
    row = [
        entry["operation"],
        entry["size"],
        str(entry["tokens"]),
        str(entry["images"]),
        _spread(us),
        _error(ours["error"]),
        rate,
    ]
    row.append(f"{entry['floor_us'] / us['median']:.0%}")
    if peer is None:
        return [*row, "none ran", "", "", ""]
    other = entry["rivals"][peer]
    ratio = f"{other['us']['median'] / us['median']:.2f} times as fast"
    return [
        *row,
        peer,
        _spread(other["us"]),
        _error(other["error"]),
        ratio + ("" if wins(entry) is not None else " (within the spread)"),
    ]


def _sampling_rows(record: Record) -> Iterator[list[str]]:
    yield ["model", "tokens", "images", "way", "ms a step", "of the first", "of the floor", "error"]
    for entry in _sorted(record):
        shape = [f"{entry['size']}/2", str(entry["tokens"]), str(entry["images"])]
        first = next(iter(entry["variants"].values()))["ms_per_step"]["median"]
        for name, timed in entry["variants"].items():
            ms = timed["ms_per_step"]
            figures = [
                _spread(ms),
                f"{first / ms['median']:.2f} times as fast",
                f"{entry['floor_ms_per_step'] / ms['median']:.0%}",
            ]
            yield [*shape, name, *figures, _error(timed["error"])]
        for name, reason in entry["left_out"].items():
            yield [*shape, name, f"left out: {reason}", "", "", ""]


def _spread(values: Record) -> str:
    return f"{values['median']:.3g} ({values['low']:.3g} to {values['high']:.3g})"


def _error(error: float | None) -> str:
    return "no number" if error is None else f"{error:.1e}"


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def left_out(record: Record) -> str:
    """Peers that did not run, each with its reason and how often."""
    counts: dict[tuple[str, str], int] = {}
    for entry in record["entries"]:
        for name, reason in entry["left_out"].items():
            counts[name, reason] = counts.get((name, reason), 0) + 1
    return "\n".join(f"left out {count} times: {name}: {reason}" for (name, reason), count in counts.items())


def plot(record: Record) -> bytes:
    """PNG: how many times as fast as each peer (kernels), or as the first way (sampling), for every entry."""
    kernels = record["kind"] == "kernels"
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(9, 1.5 + 0.25 * max(1, len(record["entries"]))), layout="constrained")
        axes = figure.add_subplot()
        labels, points = [], {}
        for y, entry in enumerate(_sorted(record)):
            shape = f"{entry['size']}, {entry['tokens']} tokens, {entry['images']} images"
            labels.append(f"{entry['operation']}, {shape}" if kernels else f"DiT-{shape}")
            times = {
                name: timed["us" if kernels else "ms_per_step"]["median"]
                for name, timed in entry["rivals" if kernels else "variants"].items()
            }
            first = times[OURS] if kernels else next(iter(times.values()))
            for name, time in times.items():
                if name != OURS or not kernels:
                    points.setdefault(name, []).append((time / first if kernels else first / time, y))
        for i, (name, where) in enumerate(points.items()):
            axes.plot(*zip(*where, strict=True), "osD^vP*"[i // 10 % 7], color=f"C{i % 10}", label=name, markersize=4)
        axes.axvline(1.0, color="0.6", linewidth=1)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        ticks = [tick for tick in TICKS if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlabel("ours is so many times as fast as" if kernels else "so many times as fast as the first")
        axes.grid(axis="x", alpha=0.3, which="both")
        figure.legend(loc="outside right upper")
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=130)
        return stream.getvalue()
