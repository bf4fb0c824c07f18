"""Which nodes cannot be quantised: each one's own error on the user's data, then the worst go back until the rest is good enough.

The error of a node is that of the network with this node alone quantised, on the calls of a real trajectory (teacher-forced:
every step starts from where the fp32 network was). It is what a single node does to the answer, so it says nothing of how errors
add up; that is why the budget is tested on the whole, after each round.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from clipdit_export.precision.apply import apply
from clipdit_export.precision.calibrate import Observed
from clipdit_export.precision.quantize import candidates
from clipdit_export.precision.recipe import Recipe
from clipdit_export.sessions import Feed, run_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What quantising one node alone does to the output of its part."""

    node: str
    error: float
    """Root of the mean square error over that of the output."""


def sensitivities(
    model: ir.Model,
    part: str,
    recipe: Recipe,
    observed: Mapping[str, Observed],
    feeds: Sequence[Feed],
    *,
    tell: Callable[[str], object] = lambda _: None,
) -> list[Sensitivity]:
    """Of every node of `model` that `recipe` quantises, the worst first.

    Args:
        feeds: calls of the fp32 graph, from real images and all times.
        tell: called with a node's name when it is done.
    """
    wanted = run_model(model, feeds)
    leave = recipe.is_not_quantised(part)
    names = [node.name or "" for node in candidates(model) if not leave(node)]
    found = []
    for name in names:
        others = tuple(f"{part}:{_literal(other)}" for other in names if other != name)
        alone = recipe.model_copy(update={"keep_half": recipe.keep_half + others})
        error = relative_error(run_model(apply(model, part, alone, observed), feeds), wanted)
        found.append(Sensitivity(node=name, error=error))
        tell(name)
    return sorted(found, key=lambda one: -one.error)


def demote(
    part: str,
    recipe: Recipe,
    ranking: Sequence[Sensitivity],
    is_good: Callable[[Recipe], bool],
    *,
    share: float = 0.1,
) -> Recipe:
    """The recipe with as few nodes kept as `is_good` allows: the worst go first, a tenth of all at a time, then by halves back.

    ValueError when it is not good even with every node kept: then quantisation is not what is wrong."""

    def keeping(count: int) -> Recipe:
        worst = tuple(f"{part}:{_literal(one.node)}" for one in ranking[:count])
        return recipe.model_copy(update={"keep_half": recipe.keep_half + worst})

    step = max(1, round(share * len(ranking)))
    bad, good = -1, None
    for count in (*range(0, len(ranking), step), len(ranking)):
        if is_good(keeping(count)):
            good = count
            break
        bad = count
        logger.info("%s of %s nodes kept: not good enough", count, len(ranking))
    if good is None:
        raise ValueError(f"{part} is not good enough even where no node is quantised; the budget or the graph is at fault")
    while good - bad > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if is_good(keeping(middle)) else (good, middle)
    return keeping(good)


def relative_error(got: Sequence[Feed], wanted: Sequence[Feed]) -> float:
    """Root mean square difference of all float outputs over their root mean square; infinite when a number is not finite."""
    difference = total = 0.0
    for one, other in zip(got, wanted, strict=True):
        for name, array in other.items():
            if np.issubdtype(array.dtype, np.floating):
                difference += float(np.square(one[name].astype(np.float64) - array).sum())
                total += float(np.square(array.astype(np.float64)).sum())
    return float(np.sqrt(difference / total)) if total and np.isfinite(difference) else float("inf")


def _literal(name: str) -> str:
    """A name in which nothing is a wildcard of fnmatch."""
    return name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]")
