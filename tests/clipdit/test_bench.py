"""One run over several ways to run a model, and what counts as a regression between two."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clipdit.bench import Bench, Candidate, read_record, regressions, run
from clipdit.bench_report import pareto_png, table
from clipdit.testing import tiny_checkpoint

SOURCES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    folder = str(tiny_checkpoint(tmp_path_factory.mktemp("bench") / "tiny"))
    candidates = [Candidate(model=folder, backend=name) for name in ("eager", "fake", "compiled:fast")]
    return run(candidates, SOURCES, targets_u8=SOURCES.flip(0), steps=2, batches=(1, 2), seconds=0.05)


@pytest.fixture
def record(bench: Bench) -> dict:
    return json.loads(json.dumps(bench.record()))


def test_every_candidate_is_measured_and_what_cannot_run_is_left_out_with_the_reason(bench: Bench):
    assert [entry.label for entry in bench.entries] == ["tiny on eager", "tiny on fake"]
    assert "has no variant fast; there are fp32, bf16" in bench.left_out["tiny on compiled:fast"]
    for entry in bench.entries:
        assert entry.images_per_s.keys() == {1, 2} and entry.image.median > entry.evaluation.median > 0
        assert entry.peak_memory_mib > 50 and 0 < entry.first_image_s < 60


def test_the_first_is_its_own_reference_and_another_model_is_far_from_it(bench: Bench):
    first, other = bench.entries
    assert first.to_reference.psnr_db == 100 and first.to_reference.ssim == pytest.approx(1)
    assert other.to_reference.psnr_db < 40 and first.to_target is not None and first.to_target.psnr_db < 40


def test_a_record_says_where_it_comes_from_and_compares_with_itself(record: dict):
    assert record["protocol"]["steps"] == 2 and record["provenance"]["versions"]["torch"]
    assert regressions(record, record) == []


def test_slower_over_the_reference_is_a_regression_and_slower_together_with_it_is_not(record: dict):
    slower = copy.deepcopy(record)
    for entry in slower["entries"]:
        entry["image"]["median"] *= 3
    assert regressions(record, slower) == []
    slower["entries"][1]["image"]["median"] *= 1.5
    (line,) = regressions(record, slower)
    assert line.startswith("tiny on fake: ") and "times the speed of tiny on eager, before" in line
    assert regressions(record, slower, tolerance=0.5) == []


def test_pictures_that_are_farther_away_and_entries_that_are_gone_are_regressions(record: dict):
    worse, fewer = copy.deepcopy(record), copy.deepcopy(record)
    for entry in record["entries"] + worse["entries"] + fewer["entries"]:
        entry["to_reference"]["st_lpips_alex"] = 0.1
    worse["entries"][1]["to_reference"]["st_lpips_alex"] = 0.11
    assert regressions(record, worse) == ["tiny on fake: 0.1100 from the reference's images (ST-LPIPS), before 0.1000"]
    third = copy.deepcopy(record["entries"][1]) | {"label": "tiny on onnx"}
    assert regressions({**record, "entries": [*record["entries"], third]}, record) == ["tiny on onnx: no longer there"]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"format": "other"}, "this is no record of `clipdit bench`"),
        ({"entries": []}, "share 0 entries"),
        ({"protocol": {"steps": 3, "size_px": [32, 32]}}, "differ in steps or size"),
    ],
)
def test_records_that_cannot_be_compared_are_refused(change: dict, reason: str, record: dict, tmp_path: Path):
    with pytest.raises(ValueError, match=reason):
        regressions(record, record | change)
    with pytest.raises(ValueError, match="there is no file"):
        read_record(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is no JSON"):
        read_record(tmp_path / "bad.json")


def test_a_first_candidate_that_cannot_run_ends_the_run(tmp_path: Path):
    with pytest.raises(ValueError, match="there is no folder"):
        run([Candidate(model=str(tmp_path / "none"), backend="eager")], SOURCES)


def test_rivals_that_may_not_fit_into_memory_side_by_side_are_announced(tmp_path: Path, monkeypatch, caplog):
    folder = str(tiny_checkpoint(tmp_path / "tiny"))
    rival = Candidate(model=folder, backend="fake")
    monkeypatch.setattr("clipdit.bench._in_fresh_process", lambda *_: (1.0, 3 * 1024))
    for gib, said in ((2, True), (4, False)):
        caplog.clear()
        monkeypatch.setattr("psutil.virtual_memory", lambda gib=gib: SimpleNamespace(total=gib * 2**30))
        run([rival], SOURCES, steps=1, batches=(), seconds=0.01)
        assert ("these 1 may need 3 GiB at once, and there are 2; if the system" in caplog.text) is said


def test_the_table_and_the_plot_show_every_entry(bench: Bench):
    lines = table(bench).splitlines()
    assert len(lines) == 3 and lines[1].startswith("tiny on eager") and len({len(line) for line in lines}) == 1
    assert pareto_png(bench).startswith(b"\x89PNG")
