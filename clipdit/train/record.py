"""What a run leaves to look at: history.jsonl, TensorBoard events and the loss curve as a picture."""

import io
import json
from pathlib import Path

from torch.utils.tensorboard.writer import SummaryWriter

from clipdit.files import naming, write_atomically

HISTORY_FILE = "history.jsonl"


class Record:
    """The written history of a run. A resumed run cuts off what came after its checkpoint, so the curve has no doubles."""

    def __init__(self, folder: Path, *, step: int):
        self.folder = folder
        self.rows = [row for row in read_history(folder) if row["step"] <= step]
        write_atomically(folder / HISTORY_FILE, "".join(map(_line, self.rows)))
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def add(self, row: dict[str, float]) -> None:
        """One row: "step" and any number of named values. Raises OSError when the disk does not take it."""
        path = self.folder / HISTORY_FILE
        with naming(path), path.open("a", encoding="utf-8") as file:  # opened anew, so that no line waits in a buffer
            file.write(_line(row))
        self.rows.append(row)
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        self._events.close()

    def plot(self) -> None:
        """Draw loss_curve.png: every loss of its own panel, raw and smoothed."""
        if len(self.rows) < 2:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: it holds global state
        from matplotlib.figure import Figure

        names = [name for name in self.rows[-1] if name.startswith("loss")]
        width, height = 7.0, 2.4 * len(names)  # inches; margins are given, since measuring them takes half a second a picture
        figure = Figure(figsize=(width, height))
        margins = {"left": 0.9 / width, "right": 1 - 0.2 / width, "bottom": 0.55 / height, "top": 1 - 0.2 / height}
        axes = figure.subplots(len(names), squeeze=False, gridspec_kw={**margins, "hspace": 0.2})[:, 0]
        for axis, name in zip(axes, names, strict=True):
            points = [(row["step"], row[name]) for row in self.rows if name in row]
            steps, values = [p[0] for p in points], [p[1] for p in points]
            axis.plot(steps, values, color="#9db4c8", linewidth=0.8, label="each interval")
            axis.plot(steps, smoothed(values), color="#1f4e79", linewidth=1.8, label="smoothed")
            axis.set_ylabel(name.removeprefix("loss/"))
            axis.grid(alpha=0.3)
            if min(values) > 0 and max(values) > 4 * values[-1]:
                axis.set_yscale("log")
        axis.set_xlabel("optimiser steps")
        figure.axes[0].legend(frameon=False)
        picture = io.BytesIO()
        FigureCanvasAgg(figure).print_png(picture)
        write_atomically(self.folder / "loss_curve.png", picture.getvalue())


def smoothed(values: list[float], keep: float = 0.8) -> list[float]:
    """The mean of two exponential moving averages, one from each end and both corrected for their start: one alone lags behind a
    falling loss and stays above it."""
    ahead, back = _average(values, keep), _average(values[::-1], keep)[::-1]
    return [(a + b) / 2 for a, b in zip(ahead, back, strict=True)]


def _average(values: list[float], keep: float) -> list[float]:
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return out


def read_history(folder: Path) -> list[dict[str, float]]:
    """The rows of a run so far; a last line cut off by a kill is left out."""
    path = folder / HISTORY_FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _line(row: dict[str, float]) -> str:
    return json.dumps(row) + "\n"
