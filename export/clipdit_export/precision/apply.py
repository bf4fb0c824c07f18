"""A recipe applied to an fp32 graph."""

from collections.abc import Mapping

import onnx_ir as ir

from clipdit_export.precision.calibrate import Observed
from clipdit_export.precision.lower import drop_unused, lower
from clipdit_export.precision.quantize import quantize
from clipdit_export.precision.recipe import Recipe


def apply(model: ir.Model, part: str, recipe: Recipe, observed: Mapping[str, Observed]) -> ir.Model:
    """A new graph that follows `recipe`; `model` (fp32, as `trace` makes it) stays as it is."""
    model = model.clone()
    if recipe.compute != "fp32":
        lower(model, recipe.compute, recipe.stays_high(part))
    if recipe.quantize is not None:
        quantize(model, recipe.quantize, observed, smooth=recipe.smooth, keep=recipe.is_not_quantised(part))
    drop_unused(model)
    return model
