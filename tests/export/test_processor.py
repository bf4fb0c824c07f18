"""What a CPU computes worse than the one that a bundle was judged on is opened last, and says so."""

import logging
import shutil
from pathlib import Path

import pytest

from clipdit.translator import Translator
from clipdit_export import processor
from clipdit_export.backends.onnx import OnnxBackend
from clipdit_export.build import build
from clipdit_export.bundle import open_bundle
from clipdit_export.order import Order
from clipdit_export.precision.recipe import default_recipe

AVX2, VNNI, AMX = "flags : fpu avx2", "flags : fpu avx2 avx512f avx512_vnni avx512_bf16", "flags : fpu avx_vnni amx_int8 amx_bf16"
SAID = "this CPU has no VNNI, so sums of 8-bit products overflow and pictures are worse than on one that has"


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes this machine one with these flags."""

    def pretend(flags: str | None, machine: str = "x86_64") -> None:
        path = tmp_path / "cpuinfo"
        path.unlink(missing_ok=True)
        if flags is not None:
            path.write_text(flags)
        monkeypatch.setattr(processor, "CPUINFO", path)
        monkeypatch.setattr(processor.platform, "machine", lambda: machine)

    return pretend


@pytest.mark.parametrize(
    "flags, machine, exactly, bf16",
    [
        (AVX2, "x86_64", False, False),
        (VNNI, "x86_64", True, True),
        (AMX, "x86_64", True, True),
        ("Features : fp asimd", "aarch64", True, False),
        (None, "AMD64", True, False),  # nothing is known, and nothing said
    ],
)
def test_what_a_cpu_multiplies_in(flags: str | None, machine: str, exactly: bool, bf16: bool, cpu):
    cpu(flags, machine)
    assert (processor.adds_int8_exactly(), processor.computes_bf16()) == (exactly, bf16)


def test_int8_comes_last_on_a_cpu_without_vnni_and_is_opened_by_name_with_a_warning(bundle: Path, cpu, caplog):
    kinds = open_bundle(bundle).manifest.variants
    cpu(VNNI)
    assert all(processor.doubt(variant) is None for variant in kinds.values())
    cpu(AVX2)
    assert {name for name, variant in kinds.items() if processor.doubt(variant) is not None} == {"onnx-int8"}
    assert OnnxBackend.variants(bundle)[-1] == "onnx-int8"
    with caplog.at_level(logging.WARNING):
        Translator.open(bundle, backend="onnx").backend.close()
        assert SAID not in caplog.text
        Translator.open(bundle, backend="onnx:onnx-int8").backend.close()
    assert f"onnx-int8: {SAID}" in caplog.text


def test_a_bundle_that_prefers_int8_opens_something_else_there(bundle: Path, tmp_path: Path, cpu):
    """One that was judged on a CPU with VNNI."""
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    text = (copy / "manifest.json").read_text()
    found = open_bundle(copy).manifest
    (copy / "manifest.json").write_text(
        found.model_copy(update={"default": "onnx-int8", "ladder": ("onnx-int8", "onnx-fp32")}).model_dump_json()
    )
    assert text != (copy / "manifest.json").read_text()
    for flags, first in ((VNNI, "onnx-int8"), (AVX2, "onnx-fp32")):
        cpu(flags)
        assert OnnxBackend.variants(copy)[0] == first
        backend = OnnxBackend.open(copy)
        assert backend.variant == first
        backend.close()


def test_a_bundle_that_is_built_there_says_why_int8_is_not_the_default(checkpoint: Path, tmp_path: Path, cpu):
    cpu(AVX2)
    manifest = build(checkpoint, tmp_path / "bundle", Order(recipes=tuple(map(default_recipe, ("fp32", "int8"))), images=1))
    assert manifest.variants["onnx-int8"].not_default == SAID and manifest.variants["onnx-int8"].quality is not None
    assert manifest.default == "onnx-fp32" and manifest.ladder == ("onnx-fp32",)
