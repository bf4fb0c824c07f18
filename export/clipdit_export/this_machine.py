"""What the core asks for without knowing us: the entry point group `clipdit.exporters`."""

from pathlib import Path

from clipdit_export.backends.opening import runs_here
from clipdit_export.build import build
from clipdit_export.manifest import Target
from clipdit_export.order import Order
from clipdit_export.precision.recipe import default_recipe


def export_for_this_machine(checkpoint: Path, out: Path) -> None:
    """Export a checkpoint in what can run here, judged by the package's samples. ValueError when it cannot be."""
    targets: list[Target] = [target for target in ("onnx", "openvino") if runs_here(target)]
    if "onnx" not in targets:
        raise ValueError("ONNX Runtime is not installed; install clipdit with its extra onnx")
    build(checkpoint, out, Order(targets=tuple(targets), recipes=tuple(map(default_recipe, ("fp32", "bf16", "int8")))))
