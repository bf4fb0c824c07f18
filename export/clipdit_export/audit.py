"""What a graph or an engine really computes in: counted from the thing itself, never from what was asked for.

TensorRT 11 has no precision flags any more, and a builder that still sets one ships an fp32 engine under another name (rf-detr
#1453, TensorRT-Model-Connect #633). So every part is counted after it is made, and an export whose precision is not there fails.
"""

import json
from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir

from clipdit_export.manifest import Audit
from clipdit_export.names import WHOLE, key_of
from clipdit_export.precision.quantize import candidates
from clipdit_export.precision.recipe import Recipe

PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Attention"})
NAMES = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT8: "int8",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.INT4: "int4-weights",
}
ENGINE_TYPES = {
    "FP32": "fp32", "FLOAT": "fp32", "FP16": "fp16", "HALF": "fp16", "BF16": "bf16", "BFLOAT16": "bf16", "INT8": "int8",
    "FP8": "fp8", "INT4": "int4-weights",
}  # fmt: skip
"""TensorRT's words, in capitals; the last one that fits holds (BFLOAT16 has FLOAT in it)."""

LEAST_SHARE = 0.5
"""Of the share that a recipe asks for: so much must be found. A builder may fuse products, and leave a few."""


class WrongPrecision(ValueError):
    """What was built does not compute in what was asked for."""


def audit_graph(model: ir.Model, wanted: str, *, expected: float = 1.0) -> Audit:
    """Products and convolutions of a graph by what they compute in; weight-only ones by what their weights are packed in."""
    counts: Counter[str] = Counter()
    for node in model.graph:
        if node.op_type in PRODUCTS:
            counts[_computes_in(node)] += _products_in(node)
    return Audit(wanted=wanted, counts=dict(sorted(counts.items())), expected=expected)


def _products_in(node: ir.Node) -> int:
    """Attention as one node is the two products that it is made of."""
    return 2 if node.op_type == "Attention" else 1


def expected_share(model: ir.Model, part: str, recipe: Recipe, *, parts: Mapping[str, ir.Model] | None = None) -> float:
    """Of the products of a part (fp32, as `trace` makes it), those that a recipe asks to compute in what it names.

    `parts`, for a graph of a whole translation: all parts of it. What is asked of them is asked of it, whether or not its own
    nodes look as if it could be done."""
    products = [node for node in model.graph if node.op_type in PRODUCTS]
    if part.startswith(WHOLE) and parts is not None:
        same = [name for name in parts if not name.startswith(WHOLE) and wanted_of(recipe, name) == wanted_of(recipe, part)]
        keys = {key_of(name, node) for name in same for node in _asked(parts[name], name, recipe)}
        asked = [node for node in products if key_of(part, node) in keys]
    else:
        asked = _asked(model, part, recipe)
    return sum(map(_products_in, asked)) / sum(map(_products_in, products)) if products else 0.0


def _asked(model: ir.Model, part: str, recipe: Recipe) -> list[ir.Node]:
    """The products of a part that a recipe asks to compute in what it names."""
    if recipe.quantises(part):
        leave = recipe.is_not_quantised(part)
        return [node for node in candidates(model) if not leave(node)]
    high = recipe.stays_high(part)
    return [node for node in model.graph if node.op_type in PRODUCTS and (recipe.compute == "fp32" or not high(node))]


def audit_engine(inspected: str, wanted: str, *, expected: float = 1.0) -> Audit:
    """From the JSON of an engine inspector: layers that multiply, by the type of their first input."""
    layers = json.loads(inspected).get("Layers", [])
    counts = Counter(_engine_type(layer) for layer in layers if isinstance(layer, Mapping) and _multiplies(layer))
    return Audit(wanted=wanted, counts=dict(sorted(counts.items())), expected=expected, read_from="engine")


def check(audit: Audit, what: str) -> None:
    """WrongPrecision when what was wanted is not there: less than LEAST_SHARE of what the recipe asks for."""
    if not sum(audit.counts.values()):
        return
    if audit.expected == 0:
        raise WrongPrecision(f"{what}: the recipe leaves nothing in {audit.wanted}; it is not shipped under that name")
    # an engine's weight-only product computes in what it always did; its weights are what is packed
    counted = audit.weights if audit.weights and audit.wanted.endswith("-weights") else audit.counts
    share = counted.get(audit.wanted.removesuffix("-weights") if counted is audit.weights else audit.wanted, 0) / sum(
        counted.values()
    )
    if share < LEAST_SHARE * audit.expected:
        found = ", ".join(f"{count} in {name}" for name, count in audit.counts.items())
        raise WrongPrecision(f"{what} was asked for in {audit.wanted} and computes {found}; it is not shipped under that name")


def wanted_of(recipe: Recipe, part: str) -> str:
    """What most products of a part must compute in under a recipe."""
    return recipe.quantize if recipe.quantize is not None and recipe.quantises(part) else recipe.compute


def _computes_in(node: ir.Node) -> str:
    data, weight = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    packed = [_packed(value) for value in (data, weight)]
    if packed[0] is not None and packed[1] is not None:
        return packed[0]
    if packed[1] is not None:
        return f"{packed[1].removesuffix('-weights')}-weights"
    return NAMES.get(data.dtype if data is not None and data.dtype is not None else ir.DataType.FLOAT, "other")


def _packed(value: ir.Value | None) -> str | None:
    """What a DequantizeLinear unpacks."""
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "DequantizeLinear" or producer.inputs[0] is None:
        return None
    dtype = producer.inputs[0].dtype
    return NAMES.get(dtype, "other") if dtype is not None else "other"


def _multiplies(layer: Mapping) -> bool:
    kind = f"{layer.get('LayerType', '')} {layer.get('Name', '')} {layer.get('TacticName', '')}".lower()
    return any(
        word in kind for word in ("gemm", "matmul", "matrix_multiply", "matrixmultiply", "conv", "mha", "attention", "caskgemm")
    )


def _engine_type(layer: Mapping) -> str:
    for tensor in layer.get("Inputs", []):
        said = str(tensor.get("Format/Datatype", tensor.get("Datatype", ""))).upper()
        found = [name for word, name in ENGINE_TYPES.items() if word in said]
        if found:
            return found[-1]
    return "other"
