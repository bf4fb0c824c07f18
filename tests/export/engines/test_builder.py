"""Real TensorRT-RTX engines, built without a GPU, and read again. Skipped where the package is not installed."""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from clipdit.testing import tiny_pipeline
from clipdit_export.audit import WrongPrecision, check
from clipdit_export.bundle import open_bundle
from clipdit_export.engines.api import capabilities, why_not
from clipdit_export.engines.build import audit
from clipdit_export.engines.builder import Built, EngineError, EngineOptions, build_engine
from clipdit_export.engines.plan_text import products
from clipdit_export.graphs import OPSETS, trace
from clipdit_export.parts import cut
from clipdit_export.precision.apply import apply
from clipdit_export.precision.recipe import default_recipe

needs_rtx = pytest.mark.skipif(why_not("tensorrt-rtx") is not None, reason=why_not("tensorrt-rtx") or "")
OPTIONS = EngineOptions(batches=(1, 2, 4), gpus=("SM89", "SM120"))


@pytest.fixture(scope="module")
def built(bundle: Path) -> dict[str, dict[str, Built]]:
    """Engines of both precisions, by part."""
    variants = open_bundle(bundle).manifest.variants
    return {
        precision: {
            part: build_engine("tensorrt-rtx", bundle / file, OPTIONS)
            for part, file in variants[f"onnx-{precision}"].parts["32x32"].items()
        }
        for precision in ("fp32", "fp16")
    }


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_part_becomes_an_engine_that_computes_in_what_its_graph_says(precision: str, built, bundle: Path):
    graphs = open_bundle(bundle).manifest.variants[f"onnx-{precision}"].audit
    for part, engine in built[precision].items():
        found = audit("tensorrt-rtx", engine, precision, 1.0)
        check(found, part)
        assert found.read_from == "engine" and set(found.counts) == {precision}
        assert sum(found.counts.values()) <= sum(graphs[part].counts.values())  # products of one input are merged
        assert set(engine.network) == {precision}


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_attention_as_one_node_becomes_the_engine_that_five_nodes_become(precision: str, tmp_path: Path):
    part = next(part for part in cut(tiny_pipeline(), (32, 32)) if part.name == "step")
    counts = []
    for opset in OPSETS:
        path = tmp_path / f"{opset}.onnx"
        model = apply(trace(part, opset=opset), "step", default_recipe(precision), {})
        ir.save(model, path, external_data=f"{opset}.weights")
        engine = build_engine("tensorrt-rtx", path, OPTIONS)
        counts.append((products(engine.data), engine.network))
    assert counts[0] == counts[1] and set(counts[0][0]) == {precision}


@needs_rtx
def test_an_fp32_engine_that_claims_fp16_is_found(built):
    with pytest.raises(WrongPrecision, match=r"step was asked for in fp16 and computes .* in fp32; it is not shipped"):
        check(audit("tensorrt-rtx", built["fp32"]["step"], "fp16", 1.0), "step")


@needs_rtx
def test_an_engine_whose_plan_cannot_be_read_is_audited_by_what_its_builder_was_given(built):
    unread = replace(built["fp32"]["step"], data=b"another format")
    found = audit("tensorrt-rtx", unread, "fp32", 1.0)
    assert found.read_from == "network" and found.counts == dict(built["fp32"]["step"].network)
    with pytest.raises(WrongPrecision):
        check(audit("tensorrt-rtx", unread, "fp16", 1.0), "step")


@needs_rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("option", ["refittable", "stripped"])
def test_an_engine_whose_weights_come_later_needs_a_gpu_and_says_so(option: str, bundle: Path):
    graph = bundle / open_bundle(bundle).manifest.variants["onnx-fp32"].parts["32x32"]["modulation"]
    with pytest.raises(EngineError, match="refittable and weight-stripped engines are compiled on a GPU, and there is none"):
        build_engine("tensorrt-rtx", graph, replace(OPTIONS, **{option: True}))


@needs_rtx
def test_a_graph_that_is_none_is_refused_in_the_parsers_words(tmp_path: Path):
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"bad\.onnx: "):
        build_engine("tensorrt-rtx", tmp_path / "bad.onnx", OPTIONS)


@needs_rtx
def test_a_gpu_that_it_has_no_engines_for_is_named_with_what_to_do():
    assert capabilities("tensorrt-rtx", ["sm89", "SM120"]) == ["SM89", "SM120"]
    with pytest.raises(ValueError, match=r"builds no engine for sm90; it knows sm75, .*Hopper runs TensorRT"):
        capabilities("tensorrt-rtx", ["sm90"])


def test_tensorrt_without_a_gpu_or_the_package_says_what_to_do():
    reason = why_not("tensorrt")
    if reason is None:
        pytest.skip("TensorRT can build here")
    assert "pip install" in reason or "export on that machine" in reason
