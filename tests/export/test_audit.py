"""The audit counts what is there, and finds a graph or an engine that claims what it is not."""

import json

import onnx_ir as ir
import pytest
from small_graphs import block, feeds

from clipdit_export.audit import WrongPrecision, audit_engine, audit_graph, check, expected_share, wanted_of
from clipdit_export.precision.calibrate import observe
from clipdit_export.precision.lower import lower
from clipdit_export.precision.quantize import candidates, quantize
from clipdit_export.precision.recipe import Recipe


def test_an_fp32_graph_that_claims_fp16_is_found():
    audit = audit_graph(block(), "fp16")
    assert audit.counts == {"fp32": 2}
    with pytest.raises(WrongPrecision, match="step was asked for in fp16 and computes 2 in fp32"):
        check(audit, "step")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_lowered_graph_is_what_it_claims(precision: str):
    model = block()
    lower(model, precision)
    audit = audit_graph(model, precision)
    assert audit.counts == {precision: 2}
    check(audit, "step")


@pytest.mark.parametrize("kind", ["int8", "fp8", "int8-weights", "int4-weights"])
def test_a_quantised_graph_is_what_it_claims(kind: str):
    model = block()
    quantize(model, kind, observe(block(), feeds(), candidates(block())), keep=lambda node: node.name == "fc2")
    audit = audit_graph(model, kind)
    assert audit.counts == {kind: 1, "fp32": 1}
    check(audit, "step")  # a half is enough: ends and islands stay high on purpose


def test_a_whole_translation_is_held_to_what_its_parts_do_though_it_hides_its_weights():
    """A weight behind a Transpose is none that can be quantised; the graph alone would promise nothing and keep that promise."""
    whole = block()
    for node in list(whole.graph):
        if node.op_type == "MatMul":
            weight = node.inputs[1]
            turned = ir.Node("", "Transpose", [weight], attributes=[ir.AttrInt64s("perm", [1, 0])], num_outputs=1)
            whole.graph.insert_before(node, turned)
            node.replace_input_with(1, turned.outputs[0])
        node.name = f"step.1:{node.name}"
    recipe = Recipe(name="int8", quantize="int8", parts=("step",))
    assert expected_share(whole, "whole_euler1_1", recipe) == 0 and candidates(whole) == []
    share = expected_share(whole, "whole_euler1_1", recipe, parts={"step": block(), "vae_encoder": block()})
    assert share == 1
    with pytest.raises(WrongPrecision, match="asked for in int8 and computes 2 in fp32"):
        check(audit_graph(whole, "int8", expected=share), "whole")


def layer(kind: str, dtype: str) -> dict:
    return {"Name": f"{kind}_1", "LayerType": kind, "Inputs": [{"Name": "x", "Format/Datatype": dtype}], "Outputs": []}


def test_an_fp32_engine_that_claims_fp16_is_found_and_a_mixed_one_counted():
    told = {"Layers": [layer("gemm", "Float"), layer("gemm", "Float"), layer("reformat", "Half"), layer("gemm", "Half")]}
    audit = audit_engine(json.dumps(told), "fp16")
    assert audit.counts == {"fp16": 1, "fp32": 2}
    with pytest.raises(WrongPrecision):
        check(audit, "engine")
    check(audit_engine(json.dumps({"Layers": [layer("convolution", "FP16")]}), "fp16"), "engine")


def test_parts_that_a_recipe_does_not_quantise_are_held_to_what_they_compute_in():
    recipe = Recipe(name="mine", compute="fp16", quantize="int8", parts=("step",))
    assert wanted_of(recipe, "step") == "int8" and wanted_of(recipe, "vae_decoder") == "fp16"
