"""The named runs: each can be built, says what it is, and differs from its neighbours in what it claims to."""

import json
from dataclasses import replace

import pytest

from clipdit.diffusion import DDPM
from clipdit.experiment import TranslationExperiment, to_json
from clipdit.flow import FlowMatching
from clipdit.presets import BUILT_IN, PRESETS, edges2emoji, paper, paper_edges2emoji, yardstick
from clipdit.train.card import changes

TRANSLATIONS = [name for name, preset in PRESETS.items() if isinstance(preset(), TranslationExperiment)]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built_and_says_what_it_is(name: str):
    first = (PRESETS[name].__doc__ or "").strip().splitlines()[0]
    assert first.endswith(".") or first.endswith(",") or len(first) > 30
    assert PRESETS[name]() == PRESETS[name]()
    json.dumps(to_json(PRESETS[name](), name), allow_nan=False)


@pytest.mark.parametrize("name", PRESETS)
def test_every_presets_batch_can_be_shared_by_two_processes(name: str):
    assert PRESETS[name]().train.batch_size % 2 == 0 or name == "pix2pixhd", "which is published with batches of one"


@pytest.mark.parametrize("name", TRANSLATIONS)
def test_guidance_is_only_used_where_the_source_was_withheld_in_training(name: str):
    preset = PRESETS[name]()
    assert preset.guidance == 1.0 or preset.drop_condition > 0


def test_the_names_of_the_promise_are_there():
    assert set(PRESETS) >= {
        "edges2emoji", "edges2shoes", "face2comics", "paper_edges2shoes", "paper_face2comics", "paper_edges2emoji", "yardstick",
        "emoji_vae", "emoji_clip", "vae_decoder",
    }  # fmt: skip


def test_the_papers_recipe_is_noise_prediction_with_clip_through_adaln_and_both_losses():
    for name in (name for name in PRESETS if name.startswith("paper_")):
        recipe = PRESETS[name]()
        assert isinstance(recipe.objective, DDPM)
        assert (recipe.model.conditioning, recipe.model.cross_attention_every) == ("clip", 0)
        assert recipe.loss.clip_similarity > 0 and recipe.loss.perceptual > 0
    assert PRESETS["paper_edges2shoes"]().loss.perceptual_network == "lpips"


def test_the_papers_recipe_on_the_emoji_differs_in_the_recipe_alone():
    differing = changes(to_json(paper_edges2emoji(), "x"), to_json(edges2emoji(), "x"))
    assert {name.partition(".")[0] for name in differing} <= {"model", "objective", "loss", "steps", "guidance"}
    assert paper(edges2emoji()) == paper_edges2emoji()
    assert paper(replace(edges2emoji(), vae="x")).vae == "x"


def test_the_yardstick_has_none_of_our_additions():
    plain = yardstick()
    assert isinstance(plain.objective, FlowMatching)
    assert plain.clip is None and plain.model.conditioning == "concat"
    assert not plain.loss.pixels
    assert plain.pairs.augment.views == 2 and plain.pairs.augment.max_rotation_degrees == 0


def test_the_built_in_parts_are_used_for_emoji_alone():
    assert edges2emoji().vae == edges2emoji().clip == BUILT_IN
    for name in ("edges2shoes", "face2comics"):
        assert BUILT_IN not in (PRESETS[name]().vae, PRESETS[name]().clip)
