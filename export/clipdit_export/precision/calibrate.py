"""What a graph's products read when real images go through: magnitudes of every channel, and rows to choose scales by."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
from jaxtyping import Float

from clipdit_export.names import WHOLE, key_of
from clipdit_export.sessions import Feed, open_model

ROWS = 1024
"""Rows kept of each tensor, drawn evenly over all that was seen."""


@dataclass(kw_only=True)
class Observed:
    """Of the data input of one node, channels last."""

    largest: Float[np.ndarray, "K"]
    """The largest magnitude of each channel."""
    rows: Float[np.ndarray, "n K"]
    """A sample of rows."""


def observe(model: ir.Model, feeds: Iterable[Feed], nodes: Iterable[ir.Node], *, seed: int = 0) -> dict[str, Observed]:
    """Run `feeds` through an fp32 `model` and watch the first input of each of `nodes`; by the nodes' names.

    ValueError without feeds, or when a number is not finite."""
    watched = {node.name or "": node for node in nodes}
    tensors = {name: _tensor(node) for name, node in watched.items()}
    inside = {v.name or "": v for v in tensors.values() if v not in model.graph.inputs}
    seen: dict[str, Observed] = {}
    counts: dict[str, int] = {}
    generator = np.random.default_rng(seed)
    with TemporaryDirectory() as folder:
        with _as_outputs(model, list(inside.values())):
            session = open_model(model, Path(folder))
        given = {i.name for i in session.get_inputs()}
        for feed in feeds:
            feed = {name: array for name, array in feed.items() if name in given}
            arrays = feed | dict(zip(inside, session.run(list(inside), feed), strict=True))
            for name, node in watched.items():
                rows = _as_rows(arrays[tensors[name].name or ""], node)
                if not np.isfinite(rows).all():
                    raise ValueError(f"{name} reads numbers that are not finite; the model cannot be calibrated")
                _add(seen, counts, name, rows, generator)
    if not seen:
        raise ValueError("no images to calibrate with; give --calibration a folder of pairs")
    return seen


def seen_by(model: ir.Model, part: str, observed: Mapping[str, Mapping[str, Observed]]) -> Mapping[str, Observed]:
    """What the nodes of a part read, by name. `observed` is by part and node; a graph of all parts was not called itself, its
    nodes read what those of the parts read."""
    if not part.startswith(WHOLE):
        return observed.get(part, {})
    known = {f"{of}:{name}": seen for of, nodes in observed.items() for name, seen in nodes.items()}
    return {node.name or "": known[key] for node in model.graph if (key := key_of(part, node)) in known}


def _tensor(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _as_rows(array: np.ndarray, node: ir.Node) -> np.ndarray:
    """(..., K): channels last; those of an image are its axis 1."""
    channels_last = np.moveaxis(array, 1, -1) if node.op_type == "Conv" else array
    return channels_last.reshape(-1, channels_last.shape[-1]).astype(np.float32)


def _add(seen: dict[str, Observed], counts: dict[str, int], name: str, rows: np.ndarray, generator: np.random.Generator) -> None:
    """Reservoir sampling by calls: each call keeps the share of the sample that it is of all rows so far."""
    count = counts.get(name, 0) + len(rows)
    room = max(1, round(ROWS * len(rows) / count))
    chosen = rows[generator.choice(len(rows), min(room, len(rows)), replace=False)]
    largest = np.abs(rows).max(0)
    if name in seen:
        old = seen[name]
        kept = old.rows[generator.permutation(len(old.rows))[: ROWS - len(chosen)]]
        seen[name] = Observed(largest=np.maximum(old.largest, largest), rows=np.concatenate([kept, chosen]))
    else:
        seen[name] = Observed(largest=largest, rows=chosen)
    counts[name] = count


@contextmanager
def _as_outputs(model: ir.Model, values: list[ir.Value]) -> Iterator[None]:
    """Tensors inside the graph as outputs of it, for as long as the block lasts."""
    added = [value for value in values if not value.is_graph_output()]
    model.graph.outputs.extend(added)
    try:
        yield
    finally:
        for value in added:
            model.graph.outputs.remove(value)
