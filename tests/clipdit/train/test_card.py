"""The model card: Hugging Face reads its header, and its command trains the same again."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from clipdit import cli
from clipdit.data.augment import Augment
from clipdit.data.pairs import find_pairs
from clipdit.experiment import Experiment, PairSettings, to_json
from clipdit.presets import PRESETS
from clipdit.train.card import AUTOENCODER, CLIP, TRANSLATOR, Kind, Told, changes, command, model_card
from clipdit.train.state import Progress


def told(experiment: Experiment, preset: str, folder: Path, kind: Kind = TRANSLATOR, minutes: float | None = None) -> Told:
    return Told(
        kind=kind,
        summary="Drawings to pictures.",
        experiment=to_json(experiment, preset) | {"data": {"pairs": 12}},
        preset=to_json(PRESETS[preset](), preset),
        data=folder,
        found=find_pairs(folder),
        out=Path("/somewhere/my run"),
        minutes=minutes,
    )


def changed() -> Experiment:
    """A variant with every kind of value."""
    preset = PRESETS["edges2emoji"]()
    return replace(
        preset,
        clip=None,
        model=replace(preset.model, conditioning="concat", qk_norm=True, mlp_ratio=2.5),
        pairs=PairSettings(size=64, cache=Path("a cache"), augment=Augment(views=1, flip=False)),
        objective=replace(preset.objective, shift=2.0),
        train=replace(preset.train, betas=(0.8, 0.9), compile=True, lr=1e-5, steps=7),
        drop_condition=0.25,
    )


def test_the_header_is_what_hugging_face_reads(pairs_folder: Path):
    for kind, library, tag in ((TRANSLATOR, "diffusers", "image-to-image"), (AUTOENCODER, "diffusers", "autoencoder"),
                               (CLIP, "transformers", "clip")):  # fmt: skip
        text = model_card(told(changed(), "edges2emoji", pairs_folder, kind), Progress(), None)
        data = ModelCard(text).data
        assert data.library_name == library
        assert data.tags is not None and {"clipdit", tag} <= set(data.tags)
    assert (
        ModelCard(model_card(told(changed(), "edges2emoji", pairs_folder), Progress(), None)).data.pipeline_tag
        == "image-to-image"
    )


def test_the_card_tells_data_settings_steps_losses_and_versions(pairs_folder: Path):
    row = {"step": 7, "loss/reconstruction": 0.123456, "loss/total": 0.2, "lr": 1e-5, "images_per_s": 3.0}
    text = model_card(told(changed(), "edges2emoji", pairs_folder), Progress(step=5, seconds=90), row)
    for wanted in (
        "# my run", "step 5 of 7", "Drawings to pictures",
        "| pairs | 12 train, 3 val |", "| layout | side-by-side, AtoB |", "| size | 64 x 64 px |",
        "| `model.mlp_ratio` | `2.5` | `3.0` |", "| `clip` | `null` | `built-in` |",
        "| `train.betas` | `[0.8, 0.9]` | `[0.9, 0.99]` |",
        "320 images in 1.5 minutes", "| reconstruction | 0.1235 |", "| total | 0.2 |", "| torch | ", "| python | 3.",
    ):  # fmt: skip
        assert wanted in text
    assert "/somewhere" not in text
    assert str(pairs_folder.parent) not in text


def test_a_card_of_the_preset_as_it_is_says_so(pairs_folder: Path):
    text = model_card(told(PRESETS["yardstick"](), "yardstick", pairs_folder), Progress(), None)
    assert "All settings are the preset's." in text
    assert "Losses at the end" not in text
    assert "clipdit train yardstick --data" in text


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_in_the_card_trains_the_same(name: str, pairs_folder: Path, monkeypatch: pytest.MonkeyPatch):
    preset = PRESETS[name]()
    experiment = changed() if name == "edges2emoji" else replace(preset, train=replace(preset.train, seed=5, compile=True))
    line = command(told(experiment, name, pairs_folder, minutes=2.5))
    calls = []

    def run(experiment, preset, data, out, *, resume, minutes):
        calls.append((experiment, preset, data, out, resume, minutes))
        return Progress()

    monkeypatch.setattr("clipdit.train.runs.run", run)
    program, *words = shlex.split(line)
    assert (program, cli.main(words)) == ("clipdit", cli.DONE)
    wanted = replace(experiment, pairs=replace(experiment.pairs, cache=None))  # a place on one machine
    assert calls == [(wanted, name, Path(pairs_folder.name), Path("my run"), False, 2.5)]


def test_changes_are_named_by_their_path():
    here = {"preset": "a", "train": {"lr": 1, "steps": 2}, "data": {"pairs": 3}, "new": None}
    assert changes(here, {"preset": "a", "train": {"lr": 1, "steps": 3}}) == {"train.steps": (2, 3)}
