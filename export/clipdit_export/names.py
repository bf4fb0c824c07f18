"""How sizes, nodes and whole translations are written in a bundle."""

import re
from typing import TYPE_CHECKING

from clipdit.sampling import SamplingTable

if TYPE_CHECKING:
    import onnx_ir as ir  # needed to build bundles, not to read them


def name_of(size: tuple[int, int]) -> str:
    """(height, width) -> "128x128", height first, as in the manifest."""
    return f"{size[0]}x{size[1]}"


def size_of(name: str) -> tuple[int, int]:
    """The inverse of `name_of`."""
    height, width = name.split("x")
    return int(height), int(width)


WHOLE = "whole_"


def whole_name(table: SamplingTable, guidance: float) -> str:
    """Of the part that holds a whole translation by this table: whole_euler4_1.5."""
    return f"{WHOLE}{table.solver}{table.steps}_{guidance:g}"


def without_count(name: str) -> str:
    """Of a name that `rename` gave: `blocks.0.qkv/MatMul_2` -> `blocks.0.qkv/MatMul`."""
    return re.sub(r"_\d+$", "", name)


def key_of(part: str, node: "ir.Node") -> str:
    """ "part:node", by which a recipe knows a node. In a graph of all parts nodes are named so, with the number of the step, and
    those of all steps have one key."""
    return re.sub(r"^(\w+)\.\d+:", r"\1:", node.name or "") if part.startswith(WHOLE) else f"{part}:{node.name}"
