"""Q/DQ: what is packed and how, that SmoothQuant and clipping do what they are for, and that the answer stays near."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import as_written, block, feeds

from clipdit_export.precision.calibrate import ROWS, observe
from clipdit_export.precision.lower import lower
from clipdit_export.precision.quantize import GRIDS, best_scale, candidates, quantize, smoothing
from clipdit_export.precision.search import relative_error
from clipdit_export.sessions import run_model


def quantised(kind: str = "int8", *, compute: str = "fp32", **settings) -> ir.Model:
    seen, model = observe(block(), feeds(), candidates(block())), block()
    if compute != "fp32":
        lower(model, compute)
    assert quantize(model, kind, seen, **settings) == ["fc1", "fc2"]
    return model


def error(model: ir.Model) -> float:
    return relative_error(as_written(model, feeds(seed=2)), run_model(block(), feeds(seed=2)))


def test_calibration_sees_the_largest_of_every_channel_and_keeps_rows():
    seen = observe(block(), feeds(), candidates(block()))
    assert seen.keys() == {"fc1", "fc2"} and seen["fc1"].largest.shape == (32,) and seen["fc2"].rows.shape[1] == 48
    assert seen["fc1"].largest.argmax() == 5 and seen["fc1"].largest[5] > 10 * np.median(seen["fc1"].largest)
    assert len(seen["fc1"].rows) == 3 * 4 * 8 <= ROWS
    np.testing.assert_allclose(np.abs(seen["fc1"].rows).max(0), seen["fc1"].largest, rtol=1e-6)


def test_watching_leaves_the_graph_as_it_was():
    model = block()
    observe(model, feeds(), candidates(model))
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_a_graph_that_is_given_no_images_is_not_calibrated():
    with pytest.raises(ValueError, match="no images to calibrate with"):
        observe(block(), [], candidates(block()))


@pytest.mark.parametrize("kind, dtype", [("int8", "INT8"), ("fp8", "FLOAT8E4M3FN")])
def test_activations_and_weights_are_packed(kind: str, dtype: str):
    model = quantised(kind)
    counts = Counter(node.op_type for node in model.graph)
    assert counts["QuantizeLinear"] == 2 and counts["DequantizeLinear"] == 4
    packed = [value for value in model.graph.initializers.values() if value.name.endswith(f".weight.{dtype.lower()}")]
    assert [value.dtype.name for value in packed] == [dtype, dtype] and packed[0].shape == (32, 48)
    (scale,) = (value for value in model.graph.initializers.values() if value.name == "fc1.weight.scale")
    assert scale.shape == (48,)  # one for an output channel


@pytest.mark.parametrize("kind, largest", [("int8", 0.02), ("int8-weights", 0.02), ("int4-weights", 0.2)])
def test_the_answer_stays_near(kind: str, largest: float):
    assert 1e-4 < error(quantised(kind)) < largest


def test_fewer_bits_are_farther_away():
    assert error(quantised("int8-weights")) < error(quantised("int4-weights")) / 4


def test_smoothquant_serves_a_channel_that_is_larger_than_the_others():
    assert error(quantised(smooth=0.5)) < 0.7 * error(quantised(smooth=0.0))
    data, weight = np.array([30.0, 1.0, 0.0]), np.array([1.0, 4.0, 1.0])
    np.testing.assert_allclose(smoothing(data, weight, 0.5), [30**0.5, 0.5, 1.0], rtol=1e-6)  # a channel that is 0 is left


def test_a_rare_large_value_is_clipped_and_an_even_spread_is_not():
    spread = np.linspace(-1, 1, 10_001)
    assert best_scale(spread, GRIDS["int8"]) == pytest.approx(1 / 127, rel=0.03)
    rare = np.concatenate([np.random.default_rng(0).normal(size=100_000), [12.0]])
    assert best_scale(rare, GRIDS["int8"]) < 0.8 * 12 / 127
    assert best_scale(np.zeros(3), GRIDS["int8"]) > 0


def test_scales_have_the_type_of_the_product():
    model = quantised(compute="fp16")
    scales = [value for value in model.graph.initializers.values() if value.name.endswith(".scale")]
    assert {value.dtype for value in scales} == {ir.DataType.FLOAT16} and len(scales) == 4
    assert error(model) < 0.02


def test_what_is_kept_is_left_and_what_was_not_seen_is_named():
    model = block()
    seen = observe(block(), feeds(), candidates(block()))
    assert quantize(model, "int8", seen, keep=lambda node: node.name == "fc2") == ["fc1"]
    with pytest.raises(ValueError, match="fc2 was not seen in calibration"):
        quantize(block(), "int8", {"fc1": seen["fc1"]})
