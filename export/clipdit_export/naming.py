"""Names of nodes and constants that a stranger can read, and that a recipe can be written in: `blocks.0.qkv/MatMul`.

The exporter names nodes by running numbers and notes on each which module it came from; a node's name here is the path of that
module in the checkpoint, then the operator, then a number where a module has several.
"""

import ast
from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir

from clipdit_export.names import without_count

SCOPES = "pkg.torch.onnx.name_scopes"
"""Under which torch's exporter notes the modules around a node, outermost first and the operation last."""
ROOTS = ("dit.", "autoencoder.vae.", "autoencoder.", "image_encoder.clip.model.", "image_encoder.clip.", "clip.model.", "clip.")
"""The wrappers of `clipdit_export.parts`: a checkpoint does not know them."""
IN_LOOP = frozenset({"modulation", "step"})
"""The parts that a whole translation has once for each step."""


def rename(model: ir.Model) -> None:
    """Give every node, and every constant that has lost its own, a name by its module. Needs the exporter's notes."""
    graph = model.graph
    paths = {node: _path(node) for node in graph}
    counts: Counter[str] = Counter()
    for node, path in paths.items():
        base = f"{path}/{node.op_type}" if path else node.op_type
        counts[base] += 1
        node.name = base if counts[base] == 1 else f"{base}_{counts[base]}"
    fixed = {*graph.inputs, *graph.outputs}
    for node in paths:
        for i, value in enumerate(node.outputs):
            if value not in fixed:
                value.name = f"{node.name}:{i}" if len(node.outputs) > 1 else node.name
    _rename_constants(graph, paths)


def attribute(whole: ir.Model, parts: Mapping[str, ir.Model]) -> None:
    """Name the nodes of a graph of all parts after those of the parts: `step.2:blocks.0.qkv/MatMul` is what
    `blocks.0.qkv/MatMul` is in the part `step`, in the second step. What belongs to no part, a solver's sums, keeps its name."""
    origins: dict[str, list[tuple[str, str]]] = {}  # (part, name) of the nodes of each module and operator, in order
    for part, model in parts.items():
        for node in model.graph:
            origins.setdefault(without_count(node.name or ""), []).append((part, node.name or ""))
    seen: Counter[str] = Counter()
    for node in whole.graph:
        base = without_count(node.name or "")
        if base in origins and "/" in base:  # without a module there is no telling
            turn, i = divmod(seen[base], len(origins[base]))
            seen[base] += 1
            part, name = origins[base][i]
            if part in IN_LOOP:
                node.name = f"{part}.{turn + 1}:{name}"
            elif turn == 0:
                node.name = f"{part}:{name}"


def _rename_constants(graph: ir.Graph, paths: dict[ir.Node, str]) -> None:
    """Parameters by their names in the checkpoint. A transposed weight is the optimiser's, and has none: it goes by its node."""
    values, taken = list(graph.initializers.values()), {value.name for value in (*graph.inputs, *graph.outputs)}
    taken |= {output.name for node in graph for output in node.outputs}
    for i, value in enumerate(values):  # out of the way of each other
        value.name, value.metadata_props["was"] = f"constant {i}", value.name or ""
    for value in values:
        was, users = value.metadata_props.pop("was"), [user for user in value.consumers() if user in paths]
        name = _without_root(was)
        if "." not in was and users:  # a parameter's name has a dot
            path = paths[users[0]]
            kind = (
                "weight"
                if users[0].op_type in ("MatMul", "Gemm", "Conv")
                and value.const_value is not None
                and len(value.const_value.shape) > 1
                else "constant"
            )
            name = f"{path}.{kind}" if path else kind
        value.name = _free(name, taken)


def _free(name: str, taken: set[str | None]) -> str:
    found, i = name, 1
    while found in taken:
        i += 1
        found = f"{name}_{i}"
    taken.add(found)
    return found


def _path(node: ir.Node) -> str:
    """The innermost module around a node; for a linear layer that was called as a function, the one its bias belongs to."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    own = _without_root(scopes[-2]) if len(scopes) > 1 else ""
    return _of_parameter(node) or own


def _of_parameter(node: ir.Node) -> str | None:
    """The module whose weight or bias a matrix product, or the addition of its bias, reads."""
    if node.op_type not in ("MatMul", "Gemm", "Conv", "Add"):
        return None
    named = [value.name for value in node.inputs if value is not None and value.is_initializer() and "." in (value.name or "")]
    if node.op_type == "MatMul" and not named:
        following = [user for user in node.outputs[0].consumers() if user.op_type == "Add"]
        named = [value.name for user in following[:1] for value in user.inputs
                 if value is not None and value.is_initializer() and (value.name or "").endswith(".bias")]  # fmt: skip
    found = [_without_root(name) for name in named if name and name.endswith((".weight", ".bias"))]
    return found[0].rpartition(".")[0] if found else None


def _without_root(name: str) -> str:
    for root in ROOTS:
        if name == root.rstrip("."):
            return ""
        if name.startswith(root):
            return name.removeprefix(root)
    return name
