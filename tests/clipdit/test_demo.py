"""The demo, on a backend without a network: all is on the page, nothing from outside is, and what it says is what was made."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from clipdit import cli
from clipdit.demo import METRICS, Demo, read_samples, run_demo, write_demo
from clipdit.fake_backend import FakeBackend
from clipdit.images import read_image
from clipdit.translator import Translator

NAMES = ["1f534_red-circle", "1f7e6_blue-square"]


def open_fake(folder: Path, name: str) -> Translator:
    return Translator(FakeBackend(native_size=(64, 64)))


@pytest.fixture(scope="module")
def samples_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    for side in ("source", "target"):
        (folder / side).mkdir()
    for name, colour in zip(NAMES, ["red", "blue"], strict=True):
        for side, fill in (("source", "white"), ("target", colour)):
            image = Image.new("RGB", (64, 64), "white")
            getattr(ImageDraw.Draw(image), "ellipse" if colour == "red" else "rectangle")((12, 12, 52, 52), fill, "black")
            image.save(folder / side / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def demo(samples_folder: Path) -> Demo:
    backends = {"eager": None, "compiled": None, "triton": "it needs an NVIDIA GPU"}
    return run_demo(samples_folder, samples_folder, seeds=(0, 5), backends=backends, open_translator=open_fake, seconds=0.01)


@pytest.fixture(scope="module")
def written(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "demo"
    write_demo(demo, out)
    return out


def test_the_page_needs_nothing_from_outside(written: Path):
    page = (written / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in page
    assert "@import" not in page
    assert "<script" not in page


def test_the_page_shows_each_sample_with_each_seed_and_each_number_of_steps(demo: Demo, written: Path):
    page = (written / "report.html").read_text()
    pictures = page.count("<img ")
    assert pictures == len(NAMES) * (2 + len(demo.by_seed)) + len(NAMES) * (2 + len(demo.by_steps))
    assert "<figcaption>red circle</figcaption>" in page
    assert "<figcaption>blue square</figcaption>" in page


def test_the_page_reads_in_the_dark_and_on_a_phone(written: Path):
    page = (written / "report.html").read_text()
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_the_files_are_the_translations_that_were_measured(demo: Demo, written: Path):
    for seed, images in demo.by_seed.items():
        for name, image in zip(NAMES, images, strict=True):
            assert torch.equal(read_image(written / "images" / f"{name}.seed{seed}.png"), image)


def test_a_seed_gives_the_image_that_translating_alone_gives(demo: Demo):
    with open_fake(Path(), "") as translator:
        alone = translator(demo.samples.source[1:], seeds=[5])
    assert torch.equal(demo.by_seed[5][1], alone[0])


def test_equal_backends_are_said_to_be_equal(demo: Demo):
    assert [variant.name for variant in demo.variants] == ["eager", "compiled"]
    assert [variant.largest_difference for variant in demo.variants] == [0, 0]


def test_a_backend_that_cannot_run_is_named_with_the_reason(demo: Demo, written: Path):
    assert "The triton backend was left out: it needs an NVIDIA GPU." in demo.notes
    assert "it needs an NVIDIA GPU" in (written / "report.html").read_text()


def test_the_best_of_several_seeds_is_no_worse_than_the_first(demo: Demo):
    (own,) = [row for row in demo.table if row.steps == demo.steps]
    (best,) = [row for row in demo.table if "best of" in row.what]
    for name, metric in METRICS.items():
        sign = 1 if metric.higher_is_better else -1
        assert sign * best.scores[name] >= sign * own.scores[name]


def test_nothing_is_compared_with_itself(demo: Demo):
    source, target = demo.table[0], demo.table[-1]
    assert "edge_f1" not in source.scores
    assert "psnr_db" in source.scores
    assert set(target.scores) == {"edge_f1"}
    assert 0.8 < target.scores["edge_f1"] <= 1


def test_the_numbers_are_in_bench_json(demo: Demo, written: Path):
    record = json.loads((written / "bench.json").read_text())
    assert [variant["name"] for variant in record["variants"]] == ["eager", "compiled"]
    image = record["variants"][0]["timing"]["image_by_steps"][str(demo.steps)]
    assert image == asdict(demo.variants[0].timing.image_by_steps[demo.steps])
    assert 0 < image["low"] <= image["median"] <= image["high"]
    assert record["scores"] == {row.what: row.scores for row in demo.table}
    assert record["provenance"]["versions"]["torch"]


def test_without_any_backend_each_is_named_with_its_reason(samples_folder: Path):
    with pytest.raises(ValueError, match=r"the eager backend cannot run .*: the folder is damaged"):
        run_demo(samples_folder, samples_folder, backends={"eager": "the folder is damaged"})


def test_a_backend_that_does_not_exist_is_refused_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["demo", "--out", str(tmp_path / "demo"), "--backends", "eager", "warp"]) == cli.WRONG_INPUT
    assert capsys.readouterr().err.startswith("clipdit: there is no backend warp; there are ")
    assert not (tmp_path / "demo").exists()


def test_samples_without_partner_are_refused(samples_folder: Path, tmp_path: Path):
    for side, names in (("source", NAMES), ("target", NAMES[:1])):
        (tmp_path / side).mkdir()
        for name in names:
            (tmp_path / side / f"{name}.png").write_bytes((samples_folder / side / f"{name}.png").read_bytes())
    with pytest.raises(ValueError, match="2 sources and 1 targets"):
        read_samples(tmp_path)
