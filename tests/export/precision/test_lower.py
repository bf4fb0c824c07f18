"""Half precision with fp32 islands: which nodes compute low, and that the answer stays near."""

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import block, feeds

from clipdit_export.precision.lower import HALF, Overflow, drop_unused, lower
from clipdit_export.precision.search import relative_error
from clipdit_export.sessions import run_model


def types(model: ir.Model) -> dict[str, str]:
    return {node.name: node.outputs[0].dtype.name for node in model.graph}


@pytest.mark.parametrize("precision, name", [("fp16", "FLOAT16"), ("bf16", "BFLOAT16")])
def test_products_and_what_lies_between_them_are_low_and_the_residual_the_gate_and_the_norm_are_not(precision: str, name: str):
    model = block()
    assert lower(model, precision) == 2
    found = types(model)
    assert {found[node] for node in ("fc1", "bias1", "gelu", "turn", "back", "fc2")} == {name}
    assert {found[node] for node in ("norm", "modulate", "gated", "residual")} == {"FLOAT"}
    assert [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)] == 4 * [ir.DataType.FLOAT]


def test_casts_stand_only_where_precision_changes():
    model = block()
    lower(model, "fp16")
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert [(cast.inputs[0].name, cast.outputs[0].dtype.name) for cast in casts] == [("m", "FLOAT16"), ("c", "FLOAT")]


def test_the_answer_is_that_of_fp32_within_half_precision():
    model, exact = block(), run_model(block(), feeds())
    lower(model, "fp16")
    error = relative_error(run_model(model, feeds()), exact)
    assert 1e-5 < error < 2e-3  # 11 bits of mantissa; and not 0, which would be fp32 under another name


def test_a_node_that_is_kept_stays_in_fp32_and_so_does_what_depends_on_it():
    model = block()
    assert lower(model, "fp16", lambda node: node.name == "fc1") == 1
    found = types(model)
    assert {found[node] for node in ("fc1", "bias1", "gelu", "turn", "back")} == {"FLOAT"} and found["fc2"] == "FLOAT16"
    kept_all = block()
    assert lower(kept_all, "fp16", lambda _: True) == 0
    assert not [node for node in kept_all.graph if node.op_type == "Cast"]


def test_an_output_that_is_low_is_raised_under_its_own_name():
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[B,32] x) => (float[B,48] y) { [only] y = MatMul (x, w) }'
    weight = ir.tensor(np.full((32, 48), 0.5, np.float32), name="w")
    model = ir.from_onnx_text(text, initializers=[weight])
    lower(model, "fp16")
    assert [(value.name, value.dtype) for value in model.graph.outputs] == [("y", ir.DataType.FLOAT)]
    (out,) = run_model(model, [{"x": np.ones((2, 32), np.float32)}])
    np.testing.assert_array_equal(out["y"], np.full((2, 48), 16, np.float32))


def test_a_weight_beyond_fp16_is_named_and_bf16_takes_it():
    with pytest.raises(Overflow, match=r"w1 reaches .*beyond fp16's 65504; keep what reads it, or take bf16"):
        lower(block(largest=1e5), "fp16")
    assert lower(block(largest=1e5), "bf16") == 2


def test_weights_that_nothing_reads_any_more_are_dropped():
    model = block()
    lower(model, "fp16")
    drop_unused(model)
    names = {value.name: value.dtype for value in model.graph.initializers.values()}
    assert names.keys() == {"w1.fp16", "b1.fp16", "w2.fp16", "ones"} and HALF["fp16"] is names["w1.fp16"]


def test_the_graph_that_a_lowered_one_was_cloned_from_stays_in_fp32():
    model = block()
    lower(model.clone(), "fp16")
    assert set(types(model).values()) == {"FLOAT"}
