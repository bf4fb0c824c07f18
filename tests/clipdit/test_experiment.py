"""The configuration: impossible values are refused by name, and a run folder keeps all of it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from clipdit.data.augment import Augment
from clipdit.diffusion import DDPM
from clipdit.experiment import (
    EXPERIMENT_FILE,
    AutoencoderExperiment,
    ClipExperiment,
    DecoderExperiment,
    ModelSettings,
    PairSettings,
    TranslationExperiment,
    to_json,
    write_experiment,
)
from clipdit.model.dit import SIZES
from clipdit.train.autoencoder import AutoencoderSettings
from clipdit.train.loop import TrainSettings
from clipdit.train.translation import LossSettings

BASE = TranslationExperiment(vae="vae", clip="clip")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"width": 0}, r"model.width is 0; wanted at least 1"),
        ({"depth": 0}, r"model.depth is 0"),
        ({"heads": 0}, r"model.heads is 0"),
        ({"patch": 0}, r"model.patch is 0"),
        ({"width": 100, "heads": 3}, r"model.width 100 with 3 heads; wanted a whole multiple of 4 for each head"),
        ({"width": 12, "heads": 2}, r"model.width 12 with 2 heads"),
        ({"mlp_ratio": 0.0}, r"model.mlp_ratio is 0.0"),
        ({"mlp_ratio": math.nan}, r"model.mlp_ratio is nan"),
        ({"cross_attention_every": -1}, r"model.cross_attention_every is -1; wanted 0 or more"),
    ],
)
def test_impossible_models_are_refused_by_name(change: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        ModelSettings(**change)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"drop_condition": 1.5}, r"drop_condition is 1.5; wanted a share in \[0, 1\]"),
        ({"drop_condition": math.nan}, r"drop_condition is nan"),
        ({"steps": 0}, r"steps is 0; wanted at least 1"),
        ({"guidance": math.inf}, r"guidance is inf; wanted a finite number"),
        (
            {"guidance": 1.5, "drop_condition": 0.0},
            r"drop_condition 0; guidance needs .* Give --drop-condition 0.1, or",
        ),
        ({"clip": None}, r'conditioning "both" reads CLIP; give --clip, or --model.conditioning concat'),
        (
            {"clip": None, "model": ModelSettings(conditioning="concat"), "loss": LossSettings(clip_similarity=0.1)},
            r"loss.clip_similarity needs CLIP; give --clip, or --loss.clip-similarity 0",
        ),
    ],
)
def test_impossible_translations_are_refused_by_name(change: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        replace(BASE, **change)


def test_other_impossible_experiments_are_refused_by_name():
    with pytest.raises(ValueError, match=r"pairs.size is 4; wanted pixels, at least 8"):
        PairSettings(size=4)
    with pytest.raises(ValueError, match=r"pairs.size is 100; wanted a multiple of 8, the pixels of a cell"):
        AutoencoderExperiment(pairs=PairSettings(size=100))


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_dit_paper(name: str):
    model = ModelSettings.of_size(name, patch=4, conditioning="clip")
    assert (model.width, model.depth, model.heads) == SIZES[name]
    assert (model.patch, model.conditioning) == (4, "clip")


def test_a_model_is_made_as_its_settings_say():
    dit = ModelSettings(width=32, depth=3, heads=2, patch=1, conditioning="clip", cross_attention_every=2, mlp="swiglu").make(
        latent_channels=5, clip_token_width=7, clip_embedding_width=9
    )
    assert len(dit.blocks) == 3
    assert [block.cross is not None for block in dit.blocks] == [True, False, True]
    assert dit.latent_in.in_features == 5
    assert dit.blocks[0].fc1.out_features == 2 * 128 and dit.config["mlp"] == "swiglu"
    assert dict(dit.config)["clip_token_width"] == 7 and dict(dit.config)["clip_embedding_width"] == 9


def test_the_file_tells_every_setting_and_survives_json(tmp_path: Path):
    experiment = replace(
        BASE,
        pairs=PairSettings(size=64, cache=tmp_path / "cache", augment=Augment(views=4)),
        objective=DDPM(timesteps=500),
        train=TrainSettings(betas=(0.8, 0.9)),
    )
    plain = to_json(experiment, "face2comics")
    write_experiment(tmp_path, plain)
    read = json.loads((tmp_path / EXPERIMENT_FILE).read_text())
    assert read == plain
    assert read["preset"] == "face2comics"
    assert read["objective"] == {"kind": "DDPM", **{k: v for k, v in read["objective"].items() if k != "kind"}}
    assert read["objective"]["timesteps"] == 500
    assert "cache" not in read["pairs"]  # a place on one machine, and nothing that results depend on
    assert read["pairs"]["augment"]["views"] == 4
    assert read["train"]["betas"] == [0.8, 0.9]


@pytest.mark.parametrize("experiment", [AutoencoderExperiment(), ClipExperiment(), DecoderExperiment(vae="v")])
def test_experiments_without_an_objective_are_told_too(experiment):
    plain = to_json(experiment, "x")
    assert "objective" not in plain
    assert plain["train"]["steps"] == 20_000


def test_one_field_changed_is_one_line_changed():
    one, other = to_json(BASE, "x"), to_json(replace(BASE, guidance=3.0), "x")
    assert {name for name in one if one[name] != other[name]} == {"guidance"}
    vae = AutoencoderSettings()
    assert to_json(AutoencoderExperiment(model=vae), "x") == to_json(AutoencoderExperiment(model=replace(vae)), "x")
