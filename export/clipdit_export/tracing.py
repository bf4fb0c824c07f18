"""All parts of a checkpoint as graphs, for every size of the images."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from tqdm.auto import tqdm

from clipdit.pipeline import ClipDiTPipeline
from clipdit_export.graphs import OPSETS, describe, trace
from clipdit_export.names import WHOLE, name_of
from clipdit_export.naming import attribute
from clipdit_export.opsets import faster
from clipdit_export.parts import cut

Graphs = dict[str, dict[str, ir.Model]]
"""By size and part, in fp32."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """The graphs of a checkpoint."""

    graphs: Graphs
    opset: int
    """Of the step."""
    opset_ms: dict[str, float]
    """Of the step by opset, where it was measured: milliseconds of a call in ONNX Runtime."""


def trace_all(
    pipeline: ClipDiTPipeline,
    sizes: Sequence[tuple[int, int]],
    *,
    unroll: Sequence[int] = (),
    opset: int | None = None,
    fingerprint: str,
) -> Traced:
    """Trace every part for every size (height, width); the first size is where the opset of the step is measured.

    Args:
        unroll: see `clipdit_export.parts.cut`.
        opset: of the step; None is the faster one (`clipdit_export.opsets`).
        fingerprint: of the checkpoint, noted in every graph."""
    parts = {name_of(size): cut(pipeline, size, unroll=unroll) for size in sizes}
    graphs: Graphs = {size: {} for size in parts}
    opset_ms: dict[str, float] = {}
    with tqdm(total=sum(map(len, parts.values())), desc="tracing", unit="graph", disable=None) as bar:
        for size, of_size in parts.items():
            for part in of_size:
                if part.name == "step" and opset is None:
                    model, times = faster(part)
                    opset, opset_ms = model.opset_imports[""], {str(known): ms for known, ms in times.items()}
                else:
                    model = trace(part, opset=opset if part.name == "step" and opset else OPSETS[0])
                doc = (type(part.module).__doc__ or "").strip().splitlines()[0]
                describe(model, part.name, doc, {"checkpoint": fingerprint, "size": size})
                graphs[size][part.name] = model
                bar.update()
            parts_alone = {name: model for name, model in graphs[size].items() if not name.startswith(WHOLE)}
            for name in graphs[size].keys() - parts_alone.keys():
                attribute(graphs[size][name], parts_alone)
    return Traced(graphs=graphs, opset=opset or OPSETS[0], opset_ms=opset_ms)
