"""A recipe that is bad for one node is refused by the gate, and the search finds one that is not."""

from pathlib import Path

import pytest
import torch

from clipdit.pipeline import ClipDiTPipeline, save_checkpoint
from clipdit.testing import tiny_pipeline
from clipdit_export.build import build
from clipdit_export.manifest import Manifest
from clipdit_export.order import Order
from clipdit_export.precision.recipe import default_recipe, read_recipe
from clipdit_export.quality.gate import Budget

CHANNEL = 5
NODE = "blocks.0.qkv/MatMul"
BUDGET = Budget(drift=0.15, st_lpips=1.0, to_target=1.0, speedup=0.0)  # of random networks on 32 px only drift says something


def with_a_bad_node() -> ClipDiTPipeline:
    """A channel that the modulation of the first block turns to zero, with huge weights behind it: in fp32 they change nothing;
    in 8 bits they leave nothing of the other weights, which share their scales."""
    pipeline = tiny_pipeline()
    dit = pipeline.transformer
    with torch.no_grad():
        rows = dit.modulation_in.weight.unflatten(0, (6, -1)), dit.modulation_in.bias.unflatten(0, (6, -1))
        for values in rows:
            values[:2, CHANNEL] = 0
        dit.modulation_table[0, :2, CHANNEL] = torch.tensor([0.0, -1.0])  # shift, scale
        dit.modulation_table[0, 2] = 3.0  # the gate: so that attention of this block matters
        dit.blocks[0].qkv.weight[:, CHANNEL] = 1e4
    return pipeline


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("search")
    save_checkpoint(with_a_bad_node(), folder / "checkpoint")
    order = Order(recipes=tuple(map(default_recipe, ("fp32", "int8"))), search=True, budget=BUDGET, images=4)
    return folder / "bundle", build(folder / "checkpoint", folder / "bundle", order)


def test_the_gate_refuses_the_bad_recipe(searched):
    _, manifest = searched
    bad = manifest.variants["onnx-int8"]
    assert bad.quality is not None and bad.quality.worst_drift > 0.3
    assert bad.not_default is not None and "the budget is 0.15" in bad.not_default
    assert "onnx-int8" not in manifest.ladder


def test_the_search_keeps_the_bad_node_and_no_other_and_what_it_found_is_opened(searched):
    _, manifest = searched
    good = manifest.variants["onnx-int8-searched"]
    assert good.recipe.keep_half == (f"step:{NODE}",)
    assert good.quality is not None and good.quality.worst_drift <= BUDGET.drift and good.not_default is None
    assert manifest.default == "onnx-int8-searched"
    wanted, found = (manifest.variants[name].audit["step"].counts["int8"] for name in ("onnx-int8", "onnx-int8-searched"))
    assert found == wanted - 1


def test_the_recipe_that_was_found_is_a_file_that_can_be_used_again(searched, tmp_path: Path):
    folder, manifest = searched
    recipe = read_recipe(folder / "recipes" / "int8-searched.json")
    assert recipe == manifest.variants["onnx-int8-searched"].recipe
    again = build(
        folder.with_name("checkpoint"), tmp_path / "again", Order(recipes=(default_recipe("fp32"), recipe), budget=BUDGET)
    )
    assert again.variants["onnx-int8-searched"].not_default is None


def test_nothing_of_the_trials_is_left(searched):
    folder, manifest = searched
    assert not list(folder.rglob("*trial*")) and not [name for name in manifest.files if "trial" in name]
