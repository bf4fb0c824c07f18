"""`clipdit evaluate`: a JSON file, a contact sheet, a table; one line for what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipdit import cli
from clipdit.fake_backend import FakeBackend
from clipdit.metrics.judges import Judges
from clipdit.translator import Translator


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Outlines of boxes -> boxes, 48 px, 5 for training and 4 for testing; one more test pair is damaged."""
    folder, random = tmp_path / "boxes", np.random.default_rng(0)
    for split, count in (("train", 5), ("test", 4)):
        for side in ("source", "target"):
            (folder / split / side).mkdir(parents=True)
        for i in range(count):
            top, left, height, width = (*random.integers(2, 16, 2), *random.integers(12, 28, 2))
            source, target = np.full((48, 48, 3), 255, np.uint8), np.full((48, 48, 3), 255, np.uint8)
            target[top : top + height, left : left + width] = random.integers(0, 200, 3)
            source[top : top + height, left : left + width] = 0
            source[top + 1 : top + height - 1, left + 1 : left + width - 1] = 255
            Image.fromarray(source).save(folder / split / "source" / f"{i}.png")
            Image.fromarray(target).save(folder / split / "target" / f"{i}.png")
    return folder


@pytest.fixture
def fake_model(monkeypatch):
    """The model is the fake backend, and no network judges."""
    opened = []

    def open_fake(folder=None, **options) -> Translator:
        opened.append((folder, options))
        return Translator(FakeBackend(native_size=(48, 48)))

    monkeypatch.setattr(Translator, "open", open_fake)
    judges = Judges(features=None, perceptual={}, missing={"st_lpips_alex": "left out"})
    monkeypatch.setattr(Judges, "open", lambda **_: judges)
    return opened


def evaluate(*words: object) -> int:
    return cli.main(["evaluate", *map(str, words)])


def test_floors_only_measures_the_floors(data, tmp_path, capsys):
    out = tmp_path / "new" / "floors.json"
    assert evaluate("--data", data, "--out", out, "--floors-only", "--size", 48) == 0
    report = json.loads(out.read_text())
    assert list(report["rows"]) == ["copy_source", "mean_target", "real"]
    assert report["protocol"]["pairs"] == 4
    assert report["protocol"]["training_targets"] == 5
    assert report["data"]["split"] == "test"
    assert report["rows"]["copy_source"]["faithfulness"]["edge_f1"] == pytest.approx(1, abs=0.01)
    assert Image.open(out.with_suffix(".png")).width > 200
    shown = capsys.readouterr().out
    assert "copy_source" in shown
    assert "not measured: clip_similarity: there is no model; name a CLIP with --clip" in shown


def test_a_model_is_measured_with_the_settings_asked_for(data, tmp_path, fake_model, capsys):
    out = tmp_path / "fake.json"
    words = ["--data", data, "--out", out, "--model", "runs/fake", "--steps", 3, "--best-of", 2, "--seed", 5, "--limit", 3]
    assert evaluate(*words, "--backend", "fake", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(out.read_text())
    assert fake_model == [("runs/fake", {"backend": "fake", "device": None})]
    assert {key: report["model"][key] for key in ("folder", "backend", "steps")} == {
        "folder": "runs/fake",
        "backend": "fake",
        "steps": 3,
    }
    assert report["protocol"]["pairs"] == 3
    assert report["protocol"]["samples_per_source"] == 2
    assert report["protocol"]["first_seed"] == 5
    assert report["rows"]["model"]["failures"]["of"] == 6
    assert len(report["by_image"]) == 3
    assert list(report["rows"]) == ["model", "autoencoded", "copy_source", "mean_target", "real"]
    assert report["rows"]["autoencoded"]["failures"]["of"] == 3


def test_a_model_without_latents_has_no_autoencoder_to_measure(data, tmp_path, monkeypatch, fake_model):
    monkeypatch.setattr(Translator, "open", lambda *_, **__: Translator(FakeBackend(native_size=(48, 48), downscale=1)))
    assert evaluate("--data", data, "--out", tmp_path / "x.json", "--best-of", 1) == 0
    assert "autoencoded" not in json.loads((tmp_path / "x.json").read_text())["rows"]


def test_the_same_command_gives_the_same_numbers(data, tmp_path, fake_model):
    for name, batch_size in (("a", 1), ("b", 4)):
        assert evaluate("--data", data, "--out", tmp_path / f"{name}.json", "--batch-size", batch_size, "--best-of", 2) == 0
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert a["rows"] == b["rows"]
    assert a["by_image"] == b["by_image"]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_damaged_pair_is_named_and_the_exit_code_says_so(data, tmp_path, fake_model, capsys):
    (data / "test" / "target" / "2.png").write_bytes(b"\x89PNG no more")
    assert evaluate("--data", data, "--out", tmp_path / "x.json", "--best-of", 1) == cli.QUARANTINED
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["protocol"]["pairs"] == 3
    assert len({**report["problems"], **report["data"]["problems"]}) == 1
    assert "not read:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "x.txt"], "wanted a name ending in .json"),
        (["--split", "dev"], 'no pairs in split "dev"; there are test (4), train (5)'),
        (["--best-of", "0"], "--best-of is 0; wanted at least 1"),
        (["--size", "16"], "--size is 16; wanted pixels, at least 32 a side"),
        (["--floors-only", "--model", "m"], "--floors-only measures no model"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(data, tmp_path, words, said, capsys):
    floors = [] if "--floors-only" in words else ["--floors-only"]
    assert evaluate("--data", data, "--out", tmp_path / "x.json", *floors, *words) == cli.WRONG_INPUT
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipdit:")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "x.json").exists()


def test_a_clip_that_is_named_judges(data, tmp_path, monkeypatch):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    monkeypatch.setattr("clipdit.metrics.judges.NETWORKS", {})
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=8,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    words = ["--data", data, "--out", tmp_path / "x.json", "--floors-only", "--clip", tmp_path / "clip", "--faithfulness", "both"]
    assert evaluate(*words, "--size", 48) == 0
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert rows["copy_source"]["faithfulness"]["clip_similarity_to_source"] == pytest.approx(1, abs=1e-4)
    assert -1 <= rows["mean_target"]["faithfulness"]["clip_similarity_to_source"] < 1
    assert "edge_f1" in rows["real"]["faithfulness"]


def test_the_built_in_clip_judges_by_its_name(data, tmp_path, monkeypatch):
    monkeypatch.setattr("clipdit.metrics.judges.NETWORKS", {})
    assert evaluate("--data", data, "--out", tmp_path / "x.json", "--floors-only", "--size", 48, "--clip", "built-in") == 0
    report = json.loads((tmp_path / "x.json").read_text())
    assert "clip_similarity_to_target" in report["rows"]["copy_source"]["distance_to_target"]
    assert "CLIP image encoder built-in" in json.dumps(report)
