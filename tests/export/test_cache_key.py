"""An export that is up to date is not built again; when it is, the reason is said; a build that was killed goes on."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from clipdit.testing import tiny_checkpoint
from clipdit_export import cache_key as of_key
from clipdit_export.build import build
from clipdit_export.cache_key import cache_key, what_changed
from clipdit_export.engines import build as of_engines
from clipdit_export.engines.api import why_not
from clipdit_export.order import Order
from clipdit_export.pictures import from_samples
from clipdit_export.precision.recipe import default_recipe

ORDER = Order(max_batch=2, images=1)
PICTURES = from_samples((32, 32), 2)


def test_the_same_order_of_the_same_checkpoint_builds_nothing(checkpoint: Path, tmp_path: Path, caplog):
    first = build(checkpoint, tmp_path / "bundle", ORDER)
    before = (tmp_path / "bundle" / "manifest.json").stat().st_mtime_ns
    with caplog.at_level(logging.INFO, "clipdit_export"):
        assert build(checkpoint, tmp_path / "bundle", ORDER) == first
        assert "is up to date; --force builds it again" in caplog.text
        assert (tmp_path / "bundle" / "manifest.json").stat().st_mtime_ns == before
        build(checkpoint, tmp_path / "bundle", ORDER, force=True)
    assert (tmp_path / "bundle" / "manifest.json").stat().st_mtime_ns > before


@pytest.mark.slow
def test_a_changed_order_another_checkpoint_and_a_damaged_bundle_are_built_again_with_the_reason(
    checkpoint: Path, tmp_path: Path, caplog
):
    out = tmp_path / "bundle"
    build(checkpoint, out, ORDER)
    with caplog.at_level(logging.INFO, "clipdit_export"):
        build(checkpoint, out, replace(ORDER, max_batch=3))
        assert "building again: order.max_batch was 2, is 3" in caplog.text
        other = tiny_checkpoint(tmp_path / "other", seed=1)
        build(other, out, replace(ORDER, max_batch=3))
        assert "building again: checkpoint is another" in caplog.text
        data = bytearray((out / "graphs" / "weights.bin").read_bytes())
        data[100] ^= 1
        (out / "graphs" / "weights.bin").write_bytes(data)
        build(other, out, replace(ORDER, max_batch=3))
        assert "building again: " in caplog.text and "its hash differs" in caplog.text


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"order": replace(ORDER, unroll=(2,))}, "order.unroll was (), is (2,)"),
        ({"order": replace(ORDER, recipes=(default_recipe("fp32"), default_recipe("fp16")))}, "recipe.fp16 is new"),
        ({"fingerprint": "b" * 64}, "checkpoint is another"),
        ({"pictures": from_samples((32, 32), 1)}, "pictures is another"),
    ],
)
def test_what_an_export_depends_on_is_in_its_key_by_name(change: dict, reason: str):
    given = {"fingerprint": "a" * 64, "order": ORDER, "pictures": PICTURES}
    assert what_changed(cache_key(**given), cache_key(**(given | change))) == [reason]
    assert what_changed(cache_key(**given), cache_key(**given)) == []


def test_packages_code_and_the_machine_are_in_the_key(monkeypatch):
    given = {"fingerprint": "a" * 64, "order": ORDER, "pictures": PICTURES}
    before = cache_key(**given)
    monkeypatch.setattr(of_key, "export_versions", lambda: {"torch": "1.0"})
    monkeypatch.setattr(of_key, "_gpu", lambda: "Some GPU sm89, driver 600")
    monkeypatch.setattr(of_key, "_code", lambda: "c" * 64)
    said = what_changed(before, cache_key(**given))
    assert "machine.gpu was nothing, is Some GPU sm89, driver 600" in said and "code is another" in said
    assert any(line.startswith("version.torch was") and line.endswith("is 1.0") for line in said)
    assert "version.onnxruntime is gone" in said


@pytest.mark.skipif(why_not("tensorrt-rtx") is not None, reason=why_not("tensorrt-rtx") or "")
@pytest.mark.slow
def test_engines_of_a_build_that_was_interrupted_are_taken_over(checkpoint: Path, tmp_path: Path, monkeypatch):
    order, made, real = Order(targets=("onnx", "tensorrt-rtx"), gpus=("sm89",), images=1), [], of_engines.build_engine

    def build_some(*given, **named):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(named["name"])
        return real(*given, **named)

    monkeypatch.setattr(of_engines, "build_engine", build_some)
    with pytest.raises(KeyboardInterrupt):
        build(checkpoint, tmp_path / "bundle", order)
    assert len(made) == 3 and not (tmp_path / "bundle").exists()
    kept = tmp_path / "copy"
    shutil.copytree(tmp_path / ".bundle.part", kept)

    again: list[str] = []
    monkeypatch.setattr(of_engines, "build_engine", lambda *given, **named: again.append(named["name"]) or real(*given, **named))
    manifest = build(checkpoint, tmp_path / "bundle", order)
    assert len(again) == 3 and not set(again) & set(made)  # six parts
    assert all(".built.json" not in name and name != "key.json" for name in manifest.files)
    for engine in kept.glob("engines/*.engine"):
        assert (tmp_path / "bundle" / "engines" / engine.name).read_bytes() == engine.read_bytes()

    shutil.copytree(kept, tmp_path / ".other.part")  # of another order: nothing is taken from it
    again.clear()
    build(checkpoint, tmp_path / "other", replace(order, max_batch=2))
    assert len(again) == 6
