"""Which opset the step is exported in: the faster one, and only where both answer alike."""

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from clipdit.testing import tiny_pipeline
from clipdit_export import opsets
from clipdit_export.build import build
from clipdit_export.bundle import open_bundle
from clipdit_export.graphs import trace
from clipdit_export.manifest import REFERENCE
from clipdit_export.opsets import choose, faster
from clipdit_export.order import Order
from clipdit_export.parts import Part, cut
from clipdit_export.precision.recipe import default_recipe
from clipdit_export.words import describe


@pytest.fixture(scope="module")
def step() -> Part:
    return next(part for part in cut(tiny_pipeline(), (32, 32)) if part.name == "step")


@pytest.mark.parametrize("times, opset", [({20: 10.0, 23: 9.0}, 23), ({20: 10.0, 23: 9.9}, 20), ({20: 9.0, 23: 10.0}, 20)])
def test_one_node_is_taken_where_it_is_clearly_faster(times: dict[int, float], opset: int):
    assert choose(times) == opset


def test_both_are_timed_and_the_chosen_one_is_returned(step: Part):
    model, times = faster(step, seconds=0.2)
    assert times.keys() == {20, 23} and min(times.values()) > 0 and model.opset_imports[""] == choose(times)
    kinds = {node.op_type for node in model.graph}
    assert ("Attention" in kinds) == (choose(times) == 23)


def test_one_node_that_answers_otherwise_is_not_taken(step: Part, monkeypatch, caplog):
    def wrong(part: Part, *, opset: int) -> ir.Model:
        model = trace(part, opset=20)
        if opset == 23:
            for node in model.graph:
                if node.op_type == "Softmax":
                    node.op_type = "Sigmoid"
                    node.attributes.clear()
        return model

    monkeypatch.setattr(opsets, "trace", wrong)
    monkeypatch.setattr(opsets, "choose", lambda _: pytest.fail("a wrong graph was let in by its speed"))
    model, _ = faster(step, seconds=0.05)
    assert "Softmax" in {node.op_type for node in model.graph} and "stays spelled out" in caplog.text


def test_an_order_can_fix_it_and_every_recipe_follows(checkpoint: Path, tmp_path: Path):
    recipes = tuple(map(default_recipe, ("fp32", "fp16", "int8")))
    build(checkpoint, tmp_path / "bundle", Order(opset=23, recipes=recipes, images=1, max_batch=2))
    manifest = open_bundle(tmp_path / "bundle").manifest
    for variant in manifest.variants.values():
        model = onnx.load(tmp_path / "bundle" / variant.parts["32x32"]["step"], load_external_data=False)
        assert "Attention" in {node.op_type for node in model.graph.node}
        assert variant.quality is not None and variant.quality.finite and variant.quality.worst_drift < 0.1
    assert manifest.opset_ms == {} and "attention:" not in describe("bundle", manifest)


def test_a_bundle_says_what_was_measured(bundle: Path):
    manifest = open_bundle(bundle).manifest
    assert manifest.opset_ms.keys() == {"20", "23"}
    step = onnx.load(bundle / manifest.variants[REFERENCE].parts["32x32"]["step"], load_external_data=False)
    assert step.opset_import[0].version == manifest.opset == choose({int(opset): ms for opset, ms in manifest.opset_ms.items()})
    assert "ms at opset 20" in describe("bundle", manifest) and f"exported is opset {manifest.opset}" in describe(
        "bundle", manifest
    )


def test_an_opset_that_is_not_exported_is_refused():
    with pytest.raises(ValueError, match="opset is 18; wanted one of 20, 23"):
        Order(opset=18)
