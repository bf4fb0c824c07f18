"""What a run leaves to look at: history.jsonl, TensorBoard events and the loss curve as a picture."""

import json
from pathlib import Path

from torch.utils.tensorboard.writer import SummaryWriter

HISTORY_FILE = "history.jsonl"


class Record:
    """The written history of a run. A resumed run cuts off what came after its checkpoint, so the curve has no doubles."""

    def __init__(self, folder: Path, *, step: int):
        self.folder = folder
        self.rows = [row for row in read_history(folder) if row["step"] <= step]
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / HISTORY_FILE).open("w", encoding="utf-8")
        self._file.writelines(json.dumps(row) + "\n" for row in self.rows)
        self._file.flush()
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def add(self, row: dict[str, float]) -> None:
        """One row: "step" and any number of named values."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def plot(self) -> None:
        """Draw loss_curve.png: every loss of its own panel, raw and smoothed."""
        if len(self.rows) < 2:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: it holds global state
        from matplotlib.figure import Figure

        names = [name for name in self.rows[-1] if name.startswith("loss")]
        figure = Figure(figsize=(7, 2.4 * len(names)), layout="constrained")
        for axis, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
            points = [(row["step"], row[name]) for row in self.rows if name in row]
            steps, values = [p[0] for p in points], [p[1] for p in points]
            axis.plot(steps, values, color="#9db4c8", linewidth=0.8, label="each interval")
            axis.plot(steps, smoothed(values), color="#1f4e79", linewidth=1.8, label="smoothed")
            axis.set_ylabel(name.removeprefix("loss/"))
            axis.grid(alpha=0.3)
            if max(values) > 4 * values[-1] > 0:
                axis.set_yscale("log")
        axis.set_xlabel("optimiser steps")
        figure.axes[0].legend(frameon=False)
        FigureCanvasAgg(figure).print_png(self.folder / "loss_curve.png")


def smoothed(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
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
