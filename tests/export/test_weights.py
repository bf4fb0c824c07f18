"""The weight file: equal bytes once, large tensors at pages, and a graph that reads them back as they were."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from clipdit_export.weights import ALIGNMENT, WeightFile


def graph_of(**arrays: np.ndarray) -> ir.Model:
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in arrays]
    outputs = [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, array.shape) for name, array in arrays.items()]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "small", [], outputs, initializers)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


def test_equal_bytes_lie_in_the_file_once_and_large_ones_begin_at_a_page(tmp_path: Path):
    with WeightFile(tmp_path / "w.bin") as weights:
        assert weights.add(b"a" * 10) == 0 and weights.add(b"b" * 10) == 10 and weights.add(b"a" * 10) == 0
        large = weights.add(b"c" * ALIGNMENT)
        assert large == ALIGNMENT and weights.add(b"c" * ALIGNMENT) == large
    assert (tmp_path / "w.bin").stat().st_size == 2 * ALIGNMENT


def test_graphs_that_share_a_file_read_back_what_they_had(tmp_path: Path):
    rng = np.random.default_rng(0)
    shared, own, small = (rng.normal(size=size).astype(np.float32) for size in ((64, 64), (32, 64), (4,)))
    with WeightFile(tmp_path / "w.bin") as weights:
        for name, arrays in {"one": {"a": shared, "s": small}, "two": {"b": shared, "c": own}}.items():
            model = graph_of(**arrays)
            weights.take_from(model)
            ir.save(model, tmp_path / f"{name}.onnx")
    assert (tmp_path / "w.bin").stat().st_size < 2 * shared.nbytes + own.nbytes
    for name, wanted in {"one": {"a": shared, "s": small}, "two": {"b": shared, "c": own}}.items():
        found = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / f"{name}.onnx").graph.initializer}
        assert found.keys() == wanted.keys() and all(np.array_equal(found[key], wanted[key]) for key in wanted)
