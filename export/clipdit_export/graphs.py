"""A part of a checkpoint as an ONNX graph that a stranger can read: named inputs and outputs, one named batch dimension, the
parameters under their names in the checkpoint, and what it is and where it comes from in its metadata.

The graph comes from torch.export (`torch.onnx.export(dynamo=True)`); nothing in it is ours but names and metadata.
"""

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ShapeInferencePass
from onnxscript import opset20 as op
from onnxscript.optimizer import fold_constants

from clipdit_export.naming import rename
from clipdit_export.parts import Part
from clipdit_export.weights import WeightFile

ATTENTION_OPSET = 23
OPSETS: tuple[int, ...] = (20, ATTENTION_OPSET)
"""20 spells attention out, which every runtime takes and TensorRT fuses; 23 has it as one node, for runtimes of 2025 on."""


def _attention(query: Any, key: Any, value: Any, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """softmax(q k^T scale) v in five nodes: the exporter's own has fifteen, to turn keys of shapes that it does not know."""
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        raise NotImplementedError("attention with a mask, dropout or grouped heads is not exported")
    factor: Any = op.Constant(value_float=float(scale or query.shape[-1] ** -0.5))
    # into the query before the product, where TensorRT's fused kernels look for it
    turned: Any = op.Transpose(key, perm=[0, 1, 3, 2])
    scaled: Any = op.Mul(query, factor)
    scores: Any = op.MatMul(scaled, turned)
    shares: Any = op.Softmax(scores, axis=-1)
    return op.MatMul(shares, value)


_TRANSLATIONS = {torch.ops.aten.scaled_dot_product_attention.default: _attention}


def trace(part: Part, *, opset: int = OPSETS[0]) -> ir.Model:
    """The graph of a part, weights inside, batch free."""
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            part.module.eval(),
            tuple(tensor.clone() for tensor in part.inputs.values()),  # one tensor given twice would become one input
            dynamo=True,
            opset_version=opset,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_shapes=_free_batch(part),
            custom_translation_table=_TRANSLATIONS if opset < ATTENTION_OPSET else None,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    model = program.model
    for value in model.graph.inputs:  # a len() of a tensor in the traced code is enough to fix it, silently
        assert value.shape is not None and not isinstance(value.shape[0], int), f"{part.name}: the batch of {value.name} is fixed"
    _turn_weights(model)
    rename(model)
    _strip(model)
    ShapeInferencePass(strict_mode=False)(model)  # what lowers a graph asks for the type of every value
    return model


def describe(model: ir.Model, name: str, doc: str, properties: Mapping[str, str]) -> None:
    """What a viewer shows of the graph."""
    model.producer_name = "clipdit"
    model.graph.name = name
    model.graph.doc_string = doc
    model.metadata_props.update(properties)


def save(model: ir.Model, path: Path, weights: WeightFile) -> None:
    """Write a graph whose large tensors lie in `weights`, and check it: types and shapes of every value must follow."""
    weights.take_from(model)
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)


def _free_batch(part: Part) -> dict[str, Any]:
    """dynamic_shapes of torch.export: dimension 0 of every input is one and the same "batch"."""
    batch = torch.export.Dim("batch", min=1, max=65_535)
    shapes: dict[str, Any] = {}
    waiting = list(part.inputs)
    for parameter in inspect.signature(part.module.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            if not waiting:
                continue  # the paper's model reads the source through adaLN alone: its step is given no context
            shapes[parameter.name] = tuple({0: batch} for _ in waiting)
        elif waiting:
            waiting.pop(0)
            shapes[parameter.name] = {0: batch}
    return shapes


def _turn_weights(model: ir.Model) -> None:
    """Weights of linear layers the way their products read them, constants that a recipe can quantise.

    The optimiser has done so, but for large ones that several nodes read, as the steps of an unrolled loop do: each of those
    keeps a Transpose of its own."""
    for weight in model.graph.initializers.values():
        turned: dict[str, ir.Node] = {}
        for node in [user for user in weight.consumers() if user.op_type == "Transpose"]:
            same = turned.setdefault(str(node.attributes.get("perm")), node)
            if same is not node:
                ir.convenience.replace_all_uses_with(node.outputs[0], same.outputs[0])
                model.graph.remove(node, safe=True)
    fold_constants(model)


def _strip(model: ir.Model) -> None:
    """Without the exporter's notes on every node: stack traces with the paths of the machine it ran on."""
    for graph in model.graphs():
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter tells its progress and its own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
