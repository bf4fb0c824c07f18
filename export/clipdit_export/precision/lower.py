"""A graph in half precision with fp32 islands: matrix products, convolutions, attention and what lies between them in fp16 or
bf16; modulation, gates, the residual stream and the statistics of norms in fp32.

An all-fp16 DiT overflows in its residual stream, and gates and modulation multiply small differences (docs/export.md). Nobody
lists the islands: they follow from four rules.

    computes      MatMul, Conv, Softmax ...     low, unless the recipe keeps the node
    moves         Reshape, Transpose, Split ... as what they move
    accumulates   a + b, both from the network  fp32: a residual
    the rest      Add, Mul, Sigmoid, Gelu ...   low where all they read from the network is low, else fp32; norms always fp32

So a bias, an activation and the scale of attention stay low, while a gate (it multiplies by the modulation, an fp32 input) rises.
"""

from collections.abc import Callable, Iterable

import ml_dtypes
import numpy as np
import onnx_ir as ir

Keep = Callable[[ir.Node], bool]
"""Whether a node stays in fp32."""

COMPUTES = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Softmax", "Attention"})
MOVES = frozenset((
    "Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Concat", "Gather", "Expand", "Identity", "Flatten",
    "Resize", "Pad", "DepthToSpace", "SpaceToDepth",
))  # fmt: skip
STATISTICS = frozenset((
    "LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization", "ReduceMean", "ReduceSum", "Pow",
    "Sqrt", "Reciprocal", "Exp", "Cos", "Sin",
))  # fmt: skip
READS_ANY = frozenset({"Shape", "Size", "Cast"})
"""No matter what type their input has."""
BF16_OPSET = 22
"""The first opset with bfloat16 convolutions."""

HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_NUMPY = {ir.DataType.FLOAT16: np.dtype(np.float16), ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}


class Overflow(ValueError):
    """A weight is beyond the range of fp16."""


def lower(model: ir.Model, precision: str, keep: Keep = lambda _: False) -> int:
    """Rewrite `model` (all fp32; types of all values known) in place. Inputs and outputs stay as they are.

    Returns how many nodes compute in half precision. Raises Overflow, naming the weight, where fp16 cannot hold one that is not
    kept.
    """
    half = HALF[precision]
    graph, work = model.graph, _Casts(model.graph, half)
    low: set[ir.Node] = set()
    for node in list(graph):
        if _is_low(node, low, keep):
            low.add(node)
            for i, value in enumerate(node.inputs):
                if value is not None and _is_float(value, half) and not _stays_float(node, i):
                    node.replace_input_with(i, work.low(value, node))
            for value in node.outputs:
                if value.dtype == ir.DataType.FLOAT:
                    value.type = ir.TensorType(half)  # not value.dtype: type objects are shared, with clones of the graph, too
        else:
            for i, value in enumerate(node.inputs):
                if value is not None and value.dtype == half and not value.is_initializer() and node.op_type not in READS_ANY:
                    node.replace_input_with(i, work.high(value, node))
    work.raise_outputs()
    if precision == "bf16":
        model.opset_imports[""] = max(model.opset_imports.get("") or 0, BF16_OPSET)
    return sum(node.op_type in COMPUTES for node in low)


def _is_low(node: ir.Node, low: set[ir.Node], keep: Keep) -> bool:
    if node.op_type in STATISTICS or keep(node):
        return False
    if node.op_type in COMPUTES:
        return all(value.dtype == ir.DataType.FLOAT for value in node.outputs)
    read = [value for value in node.inputs if value is not None and _from_network(value)]
    floats = [value for value in read if value.dtype in (ir.DataType.FLOAT, *_NUMPY)]
    if not floats or any(value.dtype not in (ir.DataType.FLOAT, *_NUMPY) for value in node.outputs):
        return False
    if node.op_type in MOVES:
        return floats[0].producer() in low
    accumulates = node.op_type == "Add" and len(floats) > 1
    return not accumulates and all(value.producer() in low for value in floats)


def _from_network(value: ir.Value) -> bool:
    """Not a constant."""
    producer = value.producer()
    return not value.is_initializer() and (producer is None or producer.op_type != "Constant")


def _is_float(value: ir.Value, half: ir.DataType) -> bool:
    dtype = value.dtype if value.const_value is None else value.const_value.dtype  # a constant may have no type of its own
    return dtype in (ir.DataType.FLOAT, half)


def _stays_float(node: ir.Node, index: int) -> bool:
    """Inputs that ONNX types fp32 whatever the data are: the scales of Resize."""
    return node.op_type == "Resize" and index > 0


class _Casts:
    """Casts and lowered constants, each made once."""

    def __init__(self, graph: ir.Graph, half: ir.DataType):
        self._graph, self._half = graph, half
        self._low: dict[ir.Value, ir.Value] = {}
        self._high: dict[ir.Value, ir.Value] = {}

    def low(self, value: ir.Value, before: ir.Node) -> ir.Value:
        if value.dtype == self._half:
            return value
        if value not in self._low:
            constant = value.const_value if not _from_network(value) else None
            made = self._constant(value, constant) if constant is not None else self._cast(value, self._half, before)
            self._low[value] = made
        return self._low[value]

    def high(self, value: ir.Value, before: ir.Node) -> ir.Value:
        if value not in self._high:
            self._high[value] = self._cast(value, ir.DataType.FLOAT, before)
        return self._high[value]

    def raise_outputs(self) -> None:
        """Outputs are fp32 again, under their names."""
        for i, value in enumerate(self._graph.outputs):
            if value.dtype == self._half:
                name, producer = value.name, value.producer()
                assert producer is not None
                value.name = f"{name}.half"
                raised = self._cast(value, ir.DataType.FLOAT, None)
                raised.name = name
                self._graph.outputs[i] = raised

    def _cast(self, value: ir.Value, to: ir.DataType, before: ir.Node | None) -> ir.Value:
        suffix = "fp32" if to == ir.DataType.FLOAT else self._suffix
        cast = ir.node("Cast", [value], {"to": int(to)}, name=f"{value.name}/Cast.{suffix}")
        out = cast.outputs[0]
        out.name, out.dtype, out.shape = f"{value.name}.{suffix}", to, value.shape
        producer = value.producer()
        if producer is not None:
            self._graph.insert_after(producer, cast)
        elif before is not None:
            self._graph.insert_before(before, cast)  # of an input of the graph: before the first node that reads it
        else:
            self._graph.append(cast)
        return out

    @property
    def _suffix(self) -> str:
        return next(name for name, dtype in HALF.items() if dtype == self._half)

    def _constant(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        numbers = tensor.numpy().astype(np.float32)
        if (
            self._half == ir.DataType.FLOAT16
            and np.abs(numbers, where=np.isfinite(numbers), out=np.zeros_like(numbers)).max(initial=0) > 65504
        ):
            raise Overflow(
                f"{value.name} reaches {np.abs(numbers).max():.3g}, beyond fp16's 65504; keep what reads it, or take bf16"
            )
        lowered = ir.Tensor(numbers.astype(_NUMPY[self._half]), dtype=self._half, name=f"{value.name}.{self._suffix}")
        made = ir.val(lowered.name, const_value=lowered)
        self._graph.register_initializer(made)
        return made


def drop_unused(model: ir.Model) -> None:
    """Without the fp32 constants that nothing reads any more."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def low_nodes(nodes: Iterable[ir.Node], precision: str) -> list[ir.Node]:
    """Those that compute, and read and write half precision: what an audit counts."""
    half = HALF[precision]
    return [
        node
        for node in nodes
        if node.op_type in COMPUTES and all(v.dtype == half for v in (*node.inputs, *node.outputs) if v is not None and v.dtype)
    ]
