"""Names of nodes: by module, unique, and never those of inputs and outputs."""

import numpy as np
import onnx_ir as ir
import pytest

from clipdit_export.naming import SCOPES, rename

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,4] x) => (float[B,4] y)
{
  [node_1] a = MatMul (x, val_1)
  [node_2] b = Add (a, "dit.blocks.0.fc1.bias")
  [node_3] c = Relu (b)
  [node_4] d = Mul (c, val_2)
  [node_5] y = Mul (d, c)
}
"""


@pytest.fixture
def model() -> ir.Model:
    text = TEXT.replace('"dit.blocks.0.fc1.bias"', "bias")
    one = np.ones(4, np.float32)
    tensors = [ir.tensor(np.ones((4, 4), np.float32), name="val_1"), ir.tensor(one, name="bias"), ir.tensor(one, name="val_2")]
    model = ir.from_onnx_text(text, initializers=tensors)
    model.graph.initializers["bias"].name = "dit.blocks.0.fc1.bias"
    for node in model.graph:
        node.metadata_props[SCOPES] = repr(["", "dit.blocks.0", "op"])
    return model


def test_a_linear_layer_called_as_a_function_is_named_after_its_bias(model: ir.Model):
    rename(model)
    names = [node.name for node in model.graph]
    assert names == ["blocks.0.fc1/MatMul", "blocks.0.fc1/Add", "blocks.0/Relu", "blocks.0/Mul", "blocks.0/Mul_2"]
    assert [node.outputs[0].name for node in model.graph] == [*names[:-1], "y"]
    assert model.graph.inputs[0].name == "x"


def test_constants_are_named_as_in_the_checkpoint_or_after_the_module_that_reads_them(model: ir.Model):
    rename(model)
    assert set(model.graph.initializers) == {"blocks.0.fc1.weight", "blocks.0.fc1.bias", "blocks.0.constant"}


def test_a_graph_without_notes_is_named_by_operators(model: ir.Model):
    for node in model.graph:
        node.metadata_props.clear()
    rename(model)
    assert [node.name for node in model.graph][2:] == ["Relu", "Mul", "Mul_2"]
