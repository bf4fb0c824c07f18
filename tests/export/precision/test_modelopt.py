"""ModelOpt in a Python of its own: what it is asked, what comes back, and what is said when it cannot. A stand-in of it is asked
here; the real one in the last test, where CLIPDIT_MODELOPT_PYTHON names a Python that has it."""

import json
import os
import re
import stat
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import as_written, block, feeds

from clipdit_export.audit import audit_graph
from clipdit_export.build import build
from clipdit_export.names import WHOLE
from clipdit_export.order import Order
from clipdit_export.precision.modelopt import apply_modelopt, as_calibration, version
from clipdit_export.precision.recipe import Recipe, default_recipe
from clipdit_export.precision.search import relative_error
from clipdit_export.sessions import run_model

INT8 = Recipe(name="int8", quantize="int8")

PUTS_QDQ = '''
"""As ModelOpt leaves a graph: Q and DQ before what a product reads, weights in fp32 behind theirs."""
import json, re, tempfile
from pathlib import Path
import numpy as np, onnx
from onnx import helper, numpy_helper


def quantize(onnx_path, output_path, calibration_data, nodes_to_exclude, **settings):
    tempfile.mkstemp()  # it leaves one, too
    shapes = {name: array.shape for name, array in calibration_data.items()}
    said = {"shapes": shapes, "nodes_to_exclude": nodes_to_exclude, "settings": settings}
    (Path(__file__).parent / "asked.json").write_text(json.dumps(said))
    model = onnx.load(onnx_path)
    graph, weights = model.graph, {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes, done = [], set()
    for node in graph.node:
        asked = node.op_type == "MatMul" and not any(re.match(pattern, node.name) for pattern in nodes_to_exclude)
        for i, value in enumerate(list(node.input) if asked else ()):
            node.input[i] = value + "_dq"
            if value in done:
                continue
            done.add(value)
            channels = weights[value].shape[1:] if value in weights else ()
            largest = np.abs(weights[value]).max(0) if value in weights else np.float32(40)
            scale, zero = (largest / 127).astype(np.float32), np.zeros(channels, np.int8)
            graph.initializer.append(numpy_helper.from_array(scale, value + "_scale"))
            graph.initializer.append(numpy_helper.from_array(zero, value + "_zero"))
            given = [value + "_scale", value + "_zero"]
            nodes.append(helper.make_node("QuantizeLinear", [value, *given], [value + "_q"], value + "_Q", axis=1))
            nodes.append(helper.make_node("DequantizeLinear", [value + "_q", *given], [value + "_dq"], value + "_DQ", axis=1))
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, output_path)
'''
FAILS = """
def quantize(**given):
    raise RuntimeError("no kernel for\\nGelu(20) " + "x" * 500)
"""
IS_SLOW = """
import time


def quantize(**given):
    time.sleep(60)
"""
WRITES_NOTHING = """
def quantize(**given):
    pass
"""
RENAMES = """
import onnx


def quantize(onnx_path, output_path, **given):
    model = onnx.load(onnx_path)
    for node in model.graph.node:
        node.name += "_renamed"
    onnx.save(model, output_path)
"""
FIXES_THE_BATCH = """
import onnx


def quantize(onnx_path, output_path, **given):
    model = onnx.load(onnx_path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, output_path)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is left where temporary files lie, whatever happened."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield
    assert not [path for path in folder.iterdir() if path.name != ".ses"]  # that is of ONNX Runtime itself


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def other_python(folder: Path, quantize: str = PUTS_QDQ) -> Path:
    """A Python with a `modelopt` whose `quantize` is this text."""
    package = folder / "modelopt"
    (package / "onnx").mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "0.99"\n')
    (package / "onnx" / "__init__.py").write_text("")
    (package / "onnx" / "quantization.py").write_text(quantize)
    return script(folder / "python", f'PYTHONPATH="{folder}" exec "{sys.executable}" "$@"')


def asked(folder: Path) -> dict:
    return json.loads((folder / "modelopt" / "onnx" / "asked.json").read_text())


def test_a_graph_comes_back_in_int8_and_is_otherwise_what_it_was(tmp_path: Path):
    model = block()
    model.metadata_props["checkpoint"] = "abc"
    made = apply_modelopt(model, "step", INT8, feeds(), other_python(tmp_path))
    assert audit_graph(made, "int8").counts == {"int8": 2}
    assert {node.name for node in block().graph} <= {node.name for node in made.graph}
    assert [str(v.shape) for v in made.graph.inputs] == [str(v.shape) for v in block().graph.inputs]
    assert (made.graph.name, made.metadata_props["checkpoint"]) == (model.graph.name, "abc")
    assert not [node for node in model.graph if node.op_type == "QuantizeLinear"]  # the one that was given
    for batch in (1, 3):
        calls = feeds(batch=batch, seed=2)
        assert 1e-4 < relative_error(as_written(made, calls), run_model(block(), calls)) < 0.3  # one scale serves all


def test_weights_are_packed(tmp_path: Path):
    made = apply_modelopt(block(), "step", INT8, feeds(), other_python(tmp_path))
    packed = {name: value.const_value for name, value in made.graph.initializers.items() if name.endswith(".int8")}
    assert packed.keys() == {"w1.int8", "w2.int8"} and "w1" not in made.graph.initializers
    weight = block().graph.initializers["w1"].const_value.numpy()
    np.testing.assert_array_equal(packed["w1.int8"].numpy(), np.rint(weight / (np.abs(weight).max(0) / 127)))


def test_modelopt_may_touch_products_that_the_recipe_does_not_keep(tmp_path: Path):
    recipe = INT8.model_copy(update={"keep": ("step:fc2",)})
    made = apply_modelopt(block(), "step", recipe, feeds(), other_python(tmp_path))
    patterns = asked(tmp_path)["nodes_to_exclude"]
    left = {node.name for node in block().graph if any(re.match(pattern, node.name) for pattern in patterns)}
    assert left == {node.name for node in block().graph} - {"fc1"}
    assert audit_graph(made, "int8").counts == {"fp32": 1, "int8": 1}


def test_a_name_is_excluded_literally_and_whole(tmp_path: Path):
    model = block()
    for node, name in zip((node for node in model.graph if node.op_type == "MatMul"), ("a.c", "a.c[0]/x"), strict=True):
        node.name = name
    recipe = INT8.model_copy(update={"keep_half": ("step:a.c",)})
    made = apply_modelopt(model, "step", recipe, feeds(), other_python(tmp_path))
    assert not any(re.match(pattern, "a.c[0]/x") for pattern in asked(tmp_path)["nodes_to_exclude"])
    assert audit_graph(made, "int8").counts == {"fp32": 1, "int8": 1}


def test_it_is_asked_for_8_bits_beside_fp32_on_the_cpu(tmp_path: Path):
    apply_modelopt(block(), "step", INT8, feeds(count=3, batch=4), other_python(tmp_path))
    said = asked(tmp_path)
    settings = {"quantize_mode": "int8", "high_precision_dtype": "fp32", "calibration_eps": ["cpu"]}
    assert said["settings"] | settings == said["settings"]
    assert said["shapes"] == {"x": [12, 8, 32], "gate": [12, 1, 32], "scale": [12, 1, 32]}


def test_calibration_is_every_input_of_the_graph_and_no_other_with_its_images_in_step():
    calls = [
        {name: np.full((2, *array.shape[1:]), i, np.float32) for name, array in feed.items()} | {"unread": np.zeros(2)}
        for i, feed in enumerate(feeds(count=20))
    ]
    found = as_calibration(block(), calls, images=16)
    assert found.keys() == {"x", "gate", "scale"}
    of_call = {name: array.reshape(16, -1)[:, 0] for name, array in found.items()}
    np.testing.assert_array_equal(of_call["x"], of_call["gate"])
    assert len(set(of_call["x"])) > 10  # from all over, not the first
    assert len(as_calibration(block(), calls)["x"]) == 40


def test_in_a_recipe_of_half_precision_no_cast_stands_between_dq_and_product(tmp_path: Path):
    recipe = INT8.model_copy(update={"compute": "fp16"})
    made = apply_modelopt(block(), "step", recipe, feeds(), other_python(tmp_path))
    products = [node for node in made.graph if node.op_type == "MatMul"]
    assert [[value.producer().op_type for value in node.inputs] for node in products] == [["DequantizeLinear"] * 2] * 2
    assert {value.dtype for node in products for value in (*node.inputs, *node.outputs)} == {ir.DataType.FLOAT16}
    assert [value.dtype for value in made.graph.outputs] == [ir.DataType.FLOAT]
    assert relative_error(as_written(made, feeds(seed=2)), run_model(block(), feeds(seed=2))) < 0.3


def test_a_part_that_the_recipe_leaves_alone_asks_nobody(tmp_path: Path):
    recipe = INT8.model_copy(update={"parts": ("step",)})
    made = apply_modelopt(block(), "conditioner", recipe, [], tmp_path / "none")
    assert audit_graph(made, "fp32").counts == {"fp32": 2}
    with pytest.raises(ValueError, match="step was not called in calibration; leave it out of the parts of recipe int8"):
        apply_modelopt(block(), "step", recipe, [], tmp_path / "none")


@pytest.mark.parametrize(
    "quantize, reason",
    [
        (FAILS, r"ModelOpt failed in .*: Gelu\(20\).* \.\.\.; leave out --quantizer, or keep what it cannot take in a recipe"),
        (WRITES_NOTHING, r"ran and wrote no graph; wanted one that has nvidia-modelopt\[onnx\]"),
        (RENAMES, "ModelOpt took away or renamed fc1; this version of it cannot be used"),
        (FIXES_THE_BATCH, r"ModelOpt made x: FLOAT\[1,8,32\] of x: FLOAT\[B,8,32\]"),
    ],
)
def test_what_goes_wrong_over_there_is_one_line(quantize: str, reason: str, tmp_path: Path):
    with pytest.raises(ValueError, match=reason) as told:
        apply_modelopt(block(), "step", INT8, feeds(), other_python(tmp_path, quantize))
    assert "\n" not in str(told.value) and len(str(told.value)) < 500


def test_one_that_does_not_end_is_ended(tmp_path: Path):
    with pytest.raises(ValueError, match="ModelOpt took longer than 2 s, and was ended"):
        apply_modelopt(block(), "step", INT8, feeds(), other_python(tmp_path, IS_SLOW), timeout_s=2)


def test_a_python_that_is_none_or_has_no_modelopt_is_told_from_one_that_has(tmp_path: Path):
    assert version(other_python(tmp_path / "good")) == "0.99"
    bare = script(tmp_path / "bare", f'exec "{sys.executable}" -I "$@"')
    for python, reason in {
        tmp_path / "none": "there is no Python .*none that can be run; wanted one that has nvidia-modelopt",
        bare: "has no ModelOpt that can be imported: No module named 'modelopt'; wanted one that has nvidia-modelopt",
        script(tmp_path / "true", "exit 0"): "is no Python: it ran and said nothing",
        script(tmp_path / "killed", "kill -9 $$"): "ModelOpt failed in .*: exit code -9",
    }.items():
        with pytest.raises(ValueError, match=reason):
            version(python)
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    with pytest.raises(ValueError, match="broken cannot be run: Exec format error"):
        version(broken)


@pytest.mark.parametrize(
    "choice, reason",
    [
        ({"quantizer": "modelopt"}, "runs in a Python of its own; name the one that has it, as --modelopt-python"),
        ({"modelopt_python": Path("python")}, "--modelopt-python is given and --quantizer modelopt is not"),
        ({"precisions": ("fp32", "fp16")}, "is for int8 and fp8, and was given nothing that is quantised"),
        ({"precisions": ("int8", "int4-weights")}, "is for int8 and fp8, and was given int4-weights; export that without it"),
        ({"sizes": ((32, 32), (64, 64))}, "calibrates the graphs of one size; give one"),
    ],
)
def test_an_order_that_modelopt_cannot_fill_is_refused_when_it_is_made(choice: dict, reason: str):
    precisions = choice.pop("precisions", ("int8",))
    if choice.keys() != {"modelopt_python"} and "quantizer" not in choice:
        choice |= {"quantizer": "modelopt", "modelopt_python": Path("python")}
    with pytest.raises(ValueError, match=reason):
        Order(recipes=tuple(map(default_recipe, precisions)), **choice)


def order(python: Path, **choices) -> Order:
    recipes = tuple(map(default_recipe, ("fp32", "int8")))
    return Order(recipes=recipes, quantizer="modelopt", modelopt_python=python, images=4, **choices)


@pytest.mark.slow
def test_a_bundle_has_both_quantisers_side_by_side(checkpoint: Path, tmp_path: Path):
    manifest = build(checkpoint, tmp_path / "bundle", order(other_python(tmp_path / "other"), unroll=(1,)))
    ours, theirs = (manifest.variants[name] for name in ("onnx-int8", "onnx-int8-modelopt"))
    assert theirs.precision == "int8-modelopt" and theirs.recipe.parts == ours.recipe.parts and theirs.recipe.smooth == 0
    assert theirs.quality is not None and theirs.quality.finite and theirs.speed is not None
    assert theirs.audit["step"].counts["int8"] >= ours.audit["step"].counts["int8"] > 0
    assert theirs.audit["conditioner"].counts.keys() == {"fp32"}
    missing = ours.parts["32x32"].keys() - theirs.parts["32x32"].keys()
    assert len(missing) == 1 and missing.pop().startswith(WHOLE)  # it has not been called, so theirs runs step by step
    assert manifest.key["version.nvidia-modelopt"] == "0.99"


def test_a_python_without_modelopt_is_found_out_before_the_work_begins(checkpoint: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="there is no Python"):
        build(checkpoint, tmp_path / "bundle", order(tmp_path / "none"))
    assert not (tmp_path / ".bundle.part").exists()


@pytest.mark.slow
def test_the_real_one_makes_a_bundle_that_is_near_fp32(checkpoint: Path, tmp_path: Path):
    python = os.environ.get("CLIPDIT_MODELOPT_PYTHON")
    if python is None:
        pytest.skip("CLIPDIT_MODELOPT_PYTHON names no Python that has nvidia-modelopt[onnx]")
    manifest = build(checkpoint, tmp_path / "bundle", order(Path(python)))
    quality = manifest.variants["onnx-int8-modelopt"].quality
    assert quality is not None and quality.finite and 1e-4 < quality.worst_drift < 0.2
