"""The gate: what is over the budget, and which variant is opened by default."""

import re

import pytest

from clipdit_export.manifest import Quality, Speed
from clipdit_export.quality.gate import Budget, choose, why_not_good


def quality(**changes) -> Quality:
    known = {"images": 4, "finite": True, "drift": (0.01, 0.02), "psnr_db": 40.0, "ssim": 0.99, "st_lpips": 0.001}
    return Quality(**{**known, "st_lpips_to_target": 0.30, **changes})


def speed(ms: float) -> Speed:
    return Speed(per_image_ms=ms, spread_ms=(ms, ms), hardware="none")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"finite": False}, "not finite"),
        ({"drift": (0.01, 0.2)}, r"a step is 0.200 from fp32 \(relative\); the budget is 0.1"),
        ({"st_lpips": 0.03}, r"its images are 0.0300 from fp32's \(ST-LPIPS\); the budget is 0.02"),
        ({"st_lpips_to_target": 0.32}, "0.0200 farther from the targets than fp32"),
        ({"st_lpips_to_target": 0.25}, None),
        ({"st_lpips": None, "st_lpips_to_target": None}, None),
    ],
)
def test_what_is_over_the_budget_is_named(change: dict, reason: str | None):
    said = why_not_good(quality(**change), quality(), Budget())
    assert (said is None) == (reason is None)
    assert reason is None or re.search(reason, said)


def chosen(measured: dict[str, Quality], times_ms: dict[str, float]) -> tuple[list[str], dict[str, str]]:
    targets = {name: name.partition("-")[0] for name in measured}
    return choose(measured, {name: speed(ms) for name, ms in times_ms.items()}, targets, "onnx-fp32", Budget())


def test_the_fastest_that_is_good_enough_comes_first_and_every_other_says_why_it_is_not():
    measured = {
        "onnx-fp32": quality(drift=(0,)),
        "onnx-bf16": quality(),
        "onnx-fp16": quality(),
        "onnx-int8": quality(st_lpips=0.1),
    }
    measured["openvino-int8"] = quality()
    times = {"onnx-fp32": 100, "onnx-bf16": 60, "onnx-fp16": 59, "onnx-int8": 30, "openvino-int8": 40}
    ladder, reasons = chosen(measured, times)
    assert ladder == ["openvino-int8", "onnx-bf16", "onnx-fp32"] and reasons.keys() == {"onnx-int8", "onnx-fp16"}
    assert "0.1000 from fp32" in reasons["onnx-int8"] and "1.02 times the speed of onnx-bf16" in reasons["onnx-fp16"]


def test_a_slower_runtime_keeps_its_best_variant_for_machines_that_lack_the_faster_one():
    measured = {"onnx-fp32": quality(drift=(0,)), "openvino-bf16": quality(drift=(0.01,)), "onnx-int8": quality(drift=(0.05,))}
    ladder, reasons = chosen(measured, {"onnx-fp32": 100, "openvino-bf16": 30, "onnx-int8": 60})
    assert ladder == ["openvino-bf16", "onnx-int8", "onnx-fp32"] and not reasons


def test_fp32_is_opened_where_nothing_is_better():
    assert chosen({"onnx-fp32": quality()}, {"onnx-fp32": 1}) == (["onnx-fp32"], {})
