"""What to export: all that a user chooses, checked when it is said."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from clipdit_export import pictures
from clipdit_export.engines.api import capabilities
from clipdit_export.engines.builder import Flag
from clipdit_export.graphs import OPSETS
from clipdit_export.manifest import Target
from clipdit_export.precision.modelopt import MODES
from clipdit_export.precision.recipe import Recipe, default_recipe
from clipdit_export.quality.gate import Budget


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to export."""

    targets: tuple[Target, ...] = ("onnx",)
    recipes: tuple[Recipe, ...] = (default_recipe("fp32"),)
    gpus: tuple[str, ...] = ()
    """Compute capabilities of TensorRT-RTX engines, as "sm89"."""
    engine: tuple[Flag, ...] = ()
    """How engines are built; see `clipdit_export.engines.builder.EngineOptions`."""
    sizes: tuple[tuple[int, int], ...] | None = None
    """(height, width) of the images the bundle shall take, pixels; None is the size of training."""
    unroll: tuple[int, ...] = ()
    """Numbers of steps for which the whole loop is exported as one graph, too."""
    opset: int | None = None
    """Of the step: 20 spells attention out, 23 has it as one node; None is the faster one here."""
    max_batch: int = 16
    calibration: Path | None = None
    """Pairs to calibrate on and to judge by; None takes the package's samples."""
    search: bool = False
    """Whether to look, for a quantised variant that is not good enough, for the nodes that have to stay as they are."""
    images: int = pictures.COUNT
    """At most so many to calibrate on, and as many others to judge by; more take longer."""
    quantizer: Literal["clipdit", "modelopt"] = "clipdit"
    """Modelopt: beside each int8 and fp8 variant of ours, one of the same recipe that NVIDIA ModelOpt has quantised."""
    modelopt_python: Path | None = None
    """The Python that has ModelOpt; ours cannot."""
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ValueError(f"max_batch is {self.max_batch}; wanted at least 1")
        if self.opset not in (None, *OPSETS):
            raise ValueError(f"opset is {self.opset}; wanted one of {', '.join(map(str, OPSETS))}")
        if self.images < 1:
            raise ValueError(f"images is {self.images}; wanted at least 1")
        self._check_quantizer()
        if "tensorrt-rtx" in self.targets:
            if not self.gpus:
                raise ValueError("a TensorRT-RTX engine is built for certain GPUs; name them, as --gpus sm89,sm120")
            capabilities("tensorrt-rtx", list(self.gpus))

    def _check_quantizer(self) -> None:
        if self.quantizer != "modelopt":
            if self.modelopt_python is not None:
                raise ValueError("--modelopt-python is given and --quantizer modelopt is not; give both, or neither")
            return
        if self.modelopt_python is None:
            raise ValueError("--quantizer modelopt runs in a Python of its own; name the one that has it, as --modelopt-python")
        quantised = [recipe for recipe in self.recipes if recipe.quantize is not None]
        others = [recipe.name for recipe in quantised if recipe.quantize not in MODES]
        if others or not quantised:
            got = ", ".join(others) or "nothing that is quantised"
            raise ValueError(f"--quantizer modelopt is for int8 and fp8, and was given {got}; export that without it")
        if self.sizes is not None and len(set(self.sizes)) > 1:
            raise ValueError("--quantizer modelopt calibrates the graphs of one size; give one, export the others without it")
