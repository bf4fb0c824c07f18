"""The search finds the node that cannot be quantised, and keeps as few as the budget allows."""

import numpy as np
import pytest
from small_graphs import block, feeds

from clipdit_export.precision.apply import apply
from clipdit_export.precision.calibrate import observe
from clipdit_export.precision.quantize import candidates
from clipdit_export.precision.recipe import Recipe
from clipdit_export.precision.search import Sensitivity, demote, relative_error, sensitivities
from clipdit_export.sessions import run_model

BAD = Recipe(name="int8", quantize="int8", smooth=0.0)  # without smoothing, one channel of fc1 takes all of the scale


def test_the_node_with_the_large_channel_is_the_most_sensitive():
    seen = observe(block(), feeds(), candidates(block()))
    found = sensitivities(block(), "step", BAD, seen, feeds(seed=3))
    assert [one.node for one in found] == ["fc1", "fc2"] and found[0].error > 1.5 * found[1].error > 0


def test_a_recipe_that_is_found_is_within_the_budget_and_the_one_before_was_not():
    seen, exact = observe(block(), feeds(), candidates(block())), run_model(block(), feeds(seed=3))

    def error(recipe: Recipe) -> float:
        return relative_error(run_model(apply(block(), "step", recipe, seen), feeds(seed=3)), exact)

    ranking = sensitivities(block(), "step", BAD, seen, feeds(seed=3))
    budget = 0.7 * error(BAD)
    found = demote("step", BAD, ranking, lambda recipe: error(recipe) <= budget)
    assert found.keep_half == ("step:fc1",) and error(found) <= budget < error(BAD)


def test_as_few_nodes_as_possible_are_kept_whatever_the_stride():
    ranking = [Sensitivity(node=f"n{i}", error=1 / (i + 1)) for i in range(40)]
    for needed in (0, 1, 7, 8, 39, 40):
        found = demote("step", BAD, ranking, lambda recipe, needed=needed: len(recipe.keep_half) >= needed)
        assert len(found.keep_half) == needed
    with pytest.raises(ValueError, match="not good enough even where no node is quantised"):
        demote("step", BAD, ranking, lambda _: False)


def test_an_error_that_is_not_finite_is_infinite():
    good = [{"y": np.ones(3, np.float32)}]
    assert relative_error([{"y": np.array([1, np.nan, 1], np.float32)}], good) == float("inf")
    assert relative_error(good, good) == 0
