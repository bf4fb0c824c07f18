"""NVIDIA ModelOpt as the quantiser, in a Python of its own: the versions of onnx and onnxruntime that it wants are not ours.

The recipe says which nodes may be quantised and what the others run in, as for our own quantiser; ModelOpt chooses among them,
sets the scales, and quantises both products of attention, too, which we leave. Left to itself it also quantises residuals, norms
and gates, which costs a DiT most (docs/export.md). SmoothQuant it has only for PyTorch modules.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from clipdit_export.precision.lower import HALF, drop_unused, lower
from clipdit_export.precision.quantize import GRIDS, candidates
from clipdit_export.precision.recipe import Recipe
from clipdit_export.sessions import Feed

MODES = ("int8", "fp8")
"""What it is asked for: a recipe's `quantize`."""
PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})
IMAGES = 64
"""At most so many to calibrate with, drawn from all calls: each is a call of its own, and every tensor of it gets a histogram."""
TIMEOUT_S = 3600.0
"""For one part. The built-in checkpoint's step takes half a minute."""
WANTED = "wanted one that has nvidia-modelopt[onnx]; docs/export.md says how to make it"
NO_MODELOPT = 3
"""The runner's exit code."""


def version(python: Path, *, timeout_s: float = 300.0) -> str:
    """Of the ModelOpt that `python` has. ValueError, one line, when there is no such Python, or it has none."""
    with TemporaryDirectory(prefix="clipdit-modelopt-") as folder:
        said = _run(python, (), Path(folder), timeout_s).split()
    if not said:
        raise ValueError(f"{python} is no Python: it ran and said nothing; {WANTED}")
    return said[-1]


def apply_modelopt(
    model: ir.Model, part: str, recipe: Recipe, calls: Sequence[Feed], python: Path, *, timeout_s: float = TIMEOUT_S
) -> ir.Model:
    """A new graph that follows `recipe`, quantised by the ModelOpt of `python`; `model` (fp32, from `trace`) stays as it is.

    Inputs, outputs, their shapes and the names of nodes are those of `model`.

    Args:
        calls: of this part, from real images and all times; empty where the recipe quantises nothing of it.

    Raises ValueError, one line: no such Python, no ModelOpt there, no calls, it failed, or it took longer than `timeout_s`.
    """
    leave = recipe.is_not_quantised(part)
    if all(leave(node) for node in candidates(model)):
        made = model.clone()
    elif not calls:
        raise ValueError(f"{part} was not called in calibration; leave it out of the parts of recipe {recipe.name}")
    else:
        excluded = [node.name for node in model.graph if node.name and (node.op_type not in PRODUCTS or leave(node))]
        made = _quantised(model, str(recipe.quantize), excluded, as_calibration(model, calls), python, timeout_s)
        _check_same(model, made)
    if recipe.compute != "fp32":
        lower(made, recipe.compute, recipe.stays_high(part))
        _absorb_casts(made, HALF[recipe.compute])
    drop_unused(made)
    return made


def as_calibration(model: ir.Model, calls: Sequence[Feed], *, images: int = IMAGES, seed: int = 0) -> dict[str, np.ndarray]:
    """What ModelOpt's `calibration_data` wants: every input of the graph, and no other, all images end to end."""
    names = [value.name or "" for value in model.graph.inputs]
    joined = {name: np.concatenate([call[name] for call in calls]) for name in names}
    count = len(joined[names[0]])
    chosen = np.sort(np.random.default_rng(seed).permutation(count)[:images])
    return {name: array[chosen] for name, array in joined.items()}


def _quantised(
    model: ir.Model, mode: str, excluded: Sequence[str], calibration: Mapping[str, np.ndarray], python: Path, timeout_s: float
) -> ir.Model:
    with TemporaryDirectory(prefix="clipdit-modelopt-") as name:
        folder = Path(name)
        graph, calls, left, out = (folder / file for file in ("graph.onnx", "calls.npz", "excluded.json", "quantised.onnx"))
        ir.save(model, graph, external_data="weights")
        np.savez(calls, allow_pickle=False, **calibration)
        left.write_text(json.dumps(list(excluded)), encoding="utf-8")
        _run(python, (graph, calls, mode, left, out), folder, timeout_s)
        if not out.exists():
            raise ValueError(f"{python} ran and wrote no graph; {WANTED}")
        made = ir.load(out)
        ir.external_data.load_to_model(made)  # it does not write inline what is larger than 2 GB
    made.producer_name, made.graph.name, made.graph.doc_string = model.producer_name, model.graph.name, model.graph.doc_string
    made.metadata_props.update(model.metadata_props | {"quantizer": "NVIDIA ModelOpt"})
    _pack_weights(made)
    ShapeInferencePass(strict_mode=False)(made)
    return made


def _run(python: Path, arguments: Sequence[object], folder: Path, timeout_s: float) -> str:
    """What the runner printed. All that it writes lies in `folder`."""
    found = shutil.which(python)
    if found is None:
        raise ValueError(f"there is no Python {python} that can be run; {WANTED}")
    ours = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH")  # settings of this Python, not of that one
    environment = {name: value for name, value in os.environ.items() if name not in ours} | {"TMPDIR": str(folder)}
    out, log = folder / "stdout", folder / "stderr"  # files: a pipe would be waited for until whoever holds it ends
    runner = files("clipdit_export") / "assets" / "modelopt_runner.py"
    with as_file(runner) as script, out.open("wb") as to, log.open("wb") as err:
        command = [str(Path(found).absolute()), str(script), *map(str, arguments)]  # not resolved: a venv's is a link
        given = {"cwd": folder, "env": environment, "stdin": subprocess.DEVNULL, "stdout": to, "stderr": err}
        try:
            code = subprocess.run(command, **given, timeout=timeout_s, check=False).returncode
        except subprocess.TimeoutExpired:
            raise ValueError(f"ModelOpt took longer than {timeout_s:g} s, and was ended; take fewer --images") from None
        except OSError as error:
            raise ValueError(f"{python} cannot be run: {error.strerror}; {WANTED}") from error
    reason = _last_line(log) or f"exit code {code}"
    if code == NO_MODELOPT:
        raise ValueError(f"{python} has no ModelOpt that can be imported: {reason}; {WANTED}")
    if code:
        raise ValueError(f"ModelOpt failed in {python}: {reason}; leave out --quantizer, or keep what it cannot take in a recipe")
    return out.read_text(encoding="utf-8", errors="replace")


def _last_line(log: Path) -> str:
    """That says something; of a traceback it is the error itself."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return shorten(lines[-1], 200, placeholder=" ...") if lines else ""


def _check_same(model: ir.Model, made: ir.Model) -> None:
    """ValueError when a caller, or a recipe, would not find in the new graph what it knows of the old one."""

    def face(of: ir.Model) -> list[str]:
        return [f"{value.name}: {value.dtype}{value.shape}" for value in (*of.graph.inputs, *of.graph.outputs)]

    for old, new in zip(face(model), face(made), strict=False):
        if old != new:
            raise ValueError(f"ModelOpt made {new} of {old}; this version of it cannot be used, take another")
    names = {node.name for node in made.graph}
    if gone := [node.name for node in model.graph if node.op_type in PRODUCTS and node.name not in names]:
        raise ValueError(f"ModelOpt took away or renamed {gone[0]}; this version of it cannot be used, take another")


def _pack_weights(model: ir.Model) -> None:
    """Weights as their 8-bit numbers: ModelOpt leaves them in fp32 behind a QuantizeLinear, which ONNX Runtime does not fuse into
    its 8-bit products."""
    grids = {grid.dtype: grid for grid in GRIDS.values()}
    for node in list(model.graph):
        if node.op_type != "QuantizeLinear":
            continue
        weight, scale, zero = (value and value.const_value for value in (*node.inputs, None)[:3])
        if weight is None or scale is None or zero is None or zero.dtype not in grids:
            continue
        scales, axis = scale.numpy(), node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        shape = [1] * len(weight.shape)
        if scales.ndim:
            shape[axis] = -1
        name = f"{weight.name}.{zero.dtype.name.lower()}"
        packed = ir.Tensor(grids[zero.dtype].round(weight.numpy() / scales.reshape(shape)), dtype=zero.dtype, name=name)
        value = ir.val(name, const_value=packed)
        model.graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(value)
        model.graph.remove(node, safe=True)


def _absorb_casts(model: ir.Model, half: ir.DataType) -> None:
    """Where `lower` cast what a QuantizeLinear reads or a DequantizeLinear writes, these do so in half precision themselves:
    builders of engines look for them right before a product."""
    scales: dict[ir.Value, ir.Value] = {}

    def in_half(node: ir.Node) -> None:
        scale = node.inputs[1]
        assert scale is not None and scale.const_value is not None
        if scale not in scales:
            numbers = scale.const_value.numpy().astype(half.numpy())
            scales[scale] = ir.val(f"{scale.name}.half", const_value=ir.Tensor(numbers, dtype=half, name=f"{scale.name}.half"))
            model.graph.register_initializer(scales[scale])
        node.replace_input_with(1, scales[scale])

    for cast in [node for node in model.graph if node.op_type == "Cast"]:
        read, out = cast.inputs[0], cast.outputs[0]
        assert read is not None
        producer = read.producer()
        if out.dtype == half and producer is not None and producer.op_type == "DequantizeLinear" and len(read.uses()) == 1:
            in_half(producer)
            read.type = ir.TensorType(half)
            out.replace_all_uses_with(read)
        elif read.dtype == half:
            for use in [use for use in out.uses() if use.node.op_type == "QuantizeLinear" and use.idx == 0]:
                in_half(use.node)
                use.node.replace_input_with(0, read)
        if not out.uses() and not out.is_graph_output():
            model.graph.remove(cast, safe=True)
