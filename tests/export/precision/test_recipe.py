"""Recipes: what a word of --precision means, what a pattern keeps, and files that are none."""

from pathlib import Path

import pytest
from small_graphs import block

from clipdit_export.precision.recipe import Recipe, default_recipe, read_recipe


def names(recipe: Recipe, part: str = "step") -> set[str]:
    leaves = recipe.is_not_quantised(part)
    return {node.name for node in block().graph if leaves(node)}


def test_a_word_is_a_recipe():
    assert default_recipe("fp16").compute == "fp16" and default_recipe("fp16").quantize is None
    assert default_recipe("int8").quantize == "int8" and default_recipe("int8").compute == "fp32"
    with pytest.raises(ValueError, match=r"precision is 'int7'; wanted one of fp32, fp16, bf16, int8, fp8"):
        default_recipe("int7")


def test_patterns_name_a_part_and_nodes_of_it():
    recipe = Recipe(name="mine", quantize="int8", keep=("step:fc?",), keep_half=("vae_decoder:*",))
    assert names(recipe) == {"fc1", "fc2"}
    assert len(names(recipe, "vae_decoder")) == 10
    high = recipe.stays_high("step")
    assert {node.name for node in block().graph if high(node)} == {"fc1", "fc2"}
    assert not names(recipe.model_copy(update={"keep": ()}))


def test_a_part_that_is_not_named_is_not_quantised():
    recipe = Recipe(name="mine", quantize="int8", parts=("step",))
    assert len(names(recipe, "image_encoder")) == 10 and not names(recipe)


def test_a_recipe_is_read_back_as_it_was_written(tmp_path: Path):
    recipe = Recipe(name="mine", compute="fp16", quantize="int8", smooth=0.3, parts=("step",), keep=("step:a/*",))
    (tmp_path / "mine.json").write_text(recipe.model_dump_json())
    assert read_recipe(tmp_path / "mine.json") == recipe


@pytest.mark.parametrize(
    "text, reason",
    [
        ("not JSON", "is no recipe: the file: Invalid JSON"),
        ('{"name": "a", "smoothness": 1}', "is no recipe: smoothness: Extra inputs"),
        ('{"name": "a", "smooth": 2}', "is no recipe: smooth: Input should be less than or equal to 1"),
        ('{"name": "a", "keep": ["fc1"]}', r'"fc1" names no part; wanted "part:node"'),
        ('{"name": "a", "quantize": "int7"}', "is no recipe: quantize"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_a_line(text: str, reason: str, tmp_path: Path):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        read_recipe(tmp_path / "r.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="there is no recipe"):
        read_recipe(tmp_path / "none.json")
