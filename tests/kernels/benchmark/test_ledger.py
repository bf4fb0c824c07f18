"""The record that is kept with the package: which kernels it is of."""

import json
import shutil

import pytest
import torch

from clipdit_kernels.benchmark import ledger


def test_the_hash_is_of_the_kernels_and_not_of_what_measures_them(tmp_path, monkeypatch: pytest.MonkeyPatch):
    copy = tmp_path / "clipdit_kernels"
    shutil.copytree(ledger.SOURCES, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = ledger.source_hash()
    monkeypatch.setattr(ledger, "SOURCES", copy)
    assert ledger.source_hash() == before
    (copy / "benchmark" / "cases.py").write_text("")
    assert ledger.source_hash() == before
    text = (copy / "norm.py").read_text()
    described = '"""Another docstring."""\n\n\n# another comment\n' + text.replace("import torch\n", "import torch  # and one\n")
    (copy / "norm.py").write_text(described)
    assert ledger.source_hash() == before
    (copy / "norm.py").write_text(text + "ANOTHER = '# no comment'\n")
    assert ledger.source_hash() != before


@pytest.mark.parametrize(
    "text, said", [("{", "is no JSON"), ("[]", "is no record of"), ('{"format": "clipdit-bench-1"}', "is no record of")]
)
def test_a_file_that_is_no_record_is_refused(text: str, said: str, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json {said}"):
        ledger.read(tmp_path / "a.json")


def test_a_kept_record_is_stale_once_the_kernels_changed(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ledger, "KEPT", tmp_path)
    assert ledger.kept("kernels") == []
    made = ledger.begin("kernels", torch.device("cpu"), {})
    ledger.write(made, tmp_path / "kernels.json")
    (kept,) = ledger.kept("kernels")
    assert not ledger.stale(kept)
    assert ledger.stale(json.loads(json.dumps(kept)) | {"source": "0" * 64})
    assert ledger.kept("sampling") == []


def test_records_of_a_kind_are_kept_side_by_side_the_plain_one_first(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ledger, "KEPT", tmp_path)
    for name in ("sampling-tuned", "sampling"):
        ledger.write(ledger.begin("sampling", torch.device("cpu"), {"of": name}), tmp_path / f"{name}.json")
    assert [record["protocol"]["of"] for record in ledger.kept("sampling")] == ["sampling", "sampling-tuned"]


def test_what_is_kept_with_the_package_can_be_read():
    for kind in ("kernels", "sampling"):
        records = ledger.kept(kind)
        assert records and all(record["kind"] == kind for record in records)
