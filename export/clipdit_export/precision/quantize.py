"""Quantisation as the graph itself says it: QuantizeLinear and DequantizeLinear around what is to run in 8 bits or fewer.

    int8      W8A8: symmetric, one scale for a tensor of activations, one for each output channel of a weight
    fp8       the same in E4M3, for engines that multiply in it
    int8-weights, int4-weights   weights alone; the product stays in the type that it has

Activations of a transformer have a few channels that are a hundred times the others, and one scale cannot serve both. SmoothQuant
(Xiao et al. 2023) moves part of that into the weights: with s_k = max|x_k|^a / max|w_k|^(1 - a), (x / s)(s w) = x w.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from jaxtyping import Float

from clipdit_export.precision.calibrate import Observed
from clipdit_export.precision.lower import Keep
from clipdit_export.precision.recipe import Kind

SMALLEST = 16
"""Matrix products of fewer rows or columns gain nothing."""
BLOCK = 32
"""Rows of a weight that share a scale in 4 bits: one for a whole channel loses too much."""
INT4_OPSET = 21
"""The first opset with 4-bit integers."""
FP8_MAX = 448.0
_CLIPS = np.linspace(0.5, 1.0, 26)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What numbers can be held: the largest, the ONNX type, and how to round to it."""

    largest: float
    dtype: ir.DataType
    round: Callable[[np.ndarray], np.ndarray]


def _to_fp8(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)


GRIDS: dict[str, Grid] = {
    "int8": Grid(largest=127, dtype=ir.DataType.INT8, round=lambda x: np.clip(np.rint(x), -127, 127).astype(np.int8)),
    "fp8": Grid(largest=FP8_MAX, dtype=ir.DataType.FLOAT8E4M3FN, round=_to_fp8),
    "int4": Grid(largest=7, dtype=ir.DataType.INT4, round=lambda x: np.clip(np.rint(x), -7, 7).astype(ml_dtypes.int4)),
}


def candidates(model: ir.Model) -> list[ir.Node]:
    """The nodes that can be quantised: products with a constant weight that is not too small."""
    return [node for node in model.graph if _weight(node) is not None]


def quantize(
    model: ir.Model, kind: Kind, observed: Mapping[str, Observed], *, smooth: float = 0.5, keep: Keep = lambda _: False
) -> list[str]:
    """Rewrite `model` in place; lower it first where products shall run in half precision beside.

    Args:
        observed: by the name of the node, what it was seen to read; not needed for weights alone.
        smooth: a of SmoothQuant in [0, 1]; 0 leaves activations as they are. Convolutions are not smoothed.
        keep: nodes to leave.

    Returns the names of the nodes that it quantised. ValueError when one was not observed.
    """
    done = []
    for node in candidates(model):
        if keep(node):
            continue
        name = node.name or ""
        if kind in ("int8", "fp8"):
            if name not in observed:
                raise ValueError(f"{name} was not seen in calibration; calibrate with this model")
            _quantize_both(model.graph, node, GRIDS[kind], observed[name], smooth if node.op_type != "Conv" else 0.0)
        else:
            _quantize_weight_alone(model.graph, node, GRIDS["int8" if kind == "int8-weights" else "int4"])
        done.append(name)
    if done and kind == "int4-weights":
        model.opset_imports[""] = max(model.opset_imports.get("") or 0, INT4_OPSET)
    return done


def _weight(node: ir.Node) -> ir.Value | None:
    if node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.inputs) < 2:
        return None
    data, weight = node.inputs[:2]
    if data is None or weight is None or data.const_value is not None or weight.const_value is None or weight.shape is None:
        return None
    if "transA" in node.attributes and node.attributes["transA"].as_int():
        return None
    return weight if len(weight.shape) >= 2 and min(_rows_and_channels(node, weight)) >= SMALLEST else None


def _channel_axis(node: ir.Node) -> int:
    """Of the weight: the axis of output channels."""
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and bool(node.attributes["transB"].as_int())
    return 0 if node.op_type == "Conv" or transposed else 1


def _rows_and_channels(node: ir.Node, weight: ir.Value) -> tuple[int, int]:
    assert weight.const_value is not None
    shape = weight.const_value.shape.numpy()
    axis = _channel_axis(node)
    return int(np.prod(shape)) // shape[axis], shape[axis]


def _numbers(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float32)


def _quantize_both(graph: ir.Graph, node: ir.Node, grid: Grid, seen: Observed, smooth: float) -> None:
    data, weight = node.inputs[0], node.inputs[1]
    assert data is not None and weight is not None and data.dtype is not None
    dtype: ir.DataType = data.dtype
    numbers, axis, name = _numbers(weight), _channel_axis(node), node.name or ""
    rows = seen.rows
    if smooth:
        scales = smoothing(seen.largest, np.abs(numbers).max(axis=axis), smooth)
        numbers = numbers * np.expand_dims(scales, axis)
        rows = rows / scales
        factor = _constant(graph, f"{name}.smooth", (1 / scales).astype(np.float32), dtype)
        data = _insert(graph, node, "Mul", [data, factor], f"{name}/smooth", dtype, data.shape)
    scale = best_scale(rows, grid)
    scale_value = _constant(graph, f"{name}.data.scale", np.array(scale, np.float32), dtype)
    zero = _zero(graph, f"{name}.data.zero", (), grid)
    packed = _insert(graph, node, "QuantizeLinear", [data, scale_value, zero], f"{name}/QuantizeLinear", grid.dtype, data.shape)
    unpacked = _insert(
        graph, node, "DequantizeLinear", [packed, scale_value, zero], f"{name}/DequantizeLinear", dtype, data.shape
    )
    node.replace_input_with(0, unpacked)
    _put_weight(graph, node, numbers, grid, weight.dtype or ir.DataType.FLOAT)


def _quantize_weight_alone(graph: ir.Graph, node: ir.Node, grid: Grid) -> None:
    weight = node.inputs[1]
    assert weight is not None
    _put_weight(graph, node, _numbers(weight), grid, weight.dtype or ir.DataType.FLOAT, blocked=grid is GRIDS["int4"])


def _put_weight(
    graph: ir.Graph, node: ir.Node, numbers: np.ndarray, grid: Grid, dtype: ir.DataType, *, blocked: bool = False
) -> None:
    """In the place of the weight: its quantised numbers and the node that brings them back."""
    axis, name = _channel_axis(node), node.name or ""
    others = tuple(i for i in range(numbers.ndim) if i != axis)
    attributes: dict[str, int] = {"axis": axis}
    if blocked and numbers.ndim == 2 and numbers.shape[others[0]] % BLOCK == 0:
        attributes = {"axis": others[0], "block_size": BLOCK}
        tiles = np.moveaxis(numbers, others[0], -1).reshape(numbers.shape[axis], -1, BLOCK)
        largest = np.moveaxis(np.abs(tiles).max(-1), 0, axis)  # one for each channel and block, in the weight's own order
        spread = np.repeat(largest, BLOCK, axis=others[0])
    else:
        largest = np.abs(numbers).max(axis=others)
        spread = np.expand_dims(largest, others)
    scales = np.maximum(largest, 1e-12) / grid.largest
    packed = grid.round(numbers / (np.maximum(spread, 1e-12) / grid.largest))
    weight = ir.val(
        f"{name}.weight.{grid.dtype.name.lower()}", const_value=ir.Tensor(packed, dtype=grid.dtype, name=f"{name}.weight")
    )
    assert weight.const_value is not None
    weight.const_value.name = weight.name
    graph.register_initializer(weight)
    scale = _constant(graph, f"{name}.weight.scale", scales.astype(np.float32), dtype)
    zero = _zero(graph, f"{name}.weight.zero", scales.shape, grid)
    unpacked = _insert(
        graph, node, "DequantizeLinear", [weight, scale, zero], f"{name}/weight", dtype, ir.Shape(numbers.shape), attributes
    )
    node.replace_input_with(1, unpacked)


def smoothing(data: Float[np.ndarray, "K"], weight: Float[np.ndarray, "K"], share: float) -> Float[np.ndarray, "K"]:
    """SmoothQuant's s (Xiao et al. 2023, eq. 4), from the largest magnitudes of each input channel; 1 where either is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = data**share / weight ** (1 - share)
    usable = np.isfinite(scales) & (scales > 0)
    return np.where(usable, scales, 1.0).astype(np.float32)


def best_scale(seen: np.ndarray, grid: Grid) -> float:
    """The scale that loses least of what was seen, in squared error: large values that are rare are clipped."""
    largest = float(np.abs(seen).max(initial=0.0))
    if largest == 0:
        return 1.0 / grid.largest
    errors = []
    for clip in _CLIPS:
        scale = clip * largest / grid.largest
        errors.append(np.square(grid.round(seen / scale).astype(np.float32) * scale - seen).mean())
    return float(_CLIPS[int(np.argmin(errors))] * largest / grid.largest)


def _constant(graph: ir.Graph, name: str, numbers: np.ndarray, dtype: ir.DataType) -> ir.Value:
    value = ir.val(name, const_value=ir.Tensor(numbers.astype(dtype.numpy()), dtype=dtype, name=name))
    graph.register_initializer(value)
    return value


def _zero(graph: ir.Graph, name: str, shape: tuple[int, ...], grid: Grid) -> ir.Value:
    return _constant(graph, name, np.zeros(shape, np.float32), grid.dtype)


def _insert(
    graph: ir.Graph, before: ir.Node, op: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, shape, attributes=None
) -> ir.Value:
    node = ir.node(op, inputs, attributes, name=name)
    value = node.outputs[0]
    value.name, value.dtype, value.shape = name, dtype, shape
    graph.insert_before(before, node)
    return value
