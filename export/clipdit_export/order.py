"""What to export: all that a user chooses, checked when it is said."""

from dataclasses import dataclass, field
from pathlib import Path

from clipdit_export import pictures
from clipdit_export.engines.api import capabilities
from clipdit_export.engines.builder import Flag
from clipdit_export.manifest import Target
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
    max_batch: int = 16
    calibration: Path | None = None
    """Pairs to calibrate on and to judge by; None takes the package's samples."""
    search: bool = False
    """Whether to look, for a quantised variant that is not good enough, for the nodes that have to stay as they are."""
    images: int = pictures.COUNT
    """At most so many to calibrate on, and as many others to judge by; more take longer."""
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ValueError(f"max_batch is {self.max_batch}; wanted at least 1")
        if self.images < 1:
            raise ValueError(f"images is {self.images}; wanted at least 1")
        if "tensorrt-rtx" in self.targets:
            if not self.gpus:
                raise ValueError("a TensorRT-RTX engine is built for certain GPUs; name them, as --gpus sm89,sm120")
            capabilities("tensorrt-rtx", list(self.gpus))
