"""What runs in which precision, written down: read from and saved to a JSON file that a person can edit.

    {"name": "int8", "compute": "fp32", "quantize": "int8", "smooth": 0.5, "parts": ["step"],
     "keep": ["step:latent_in/*", "step:blocks.7.fc2/*"]}

`keep` names nodes by part and name, with * and ?. Engines before and after quantisation follow the same file.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from clipdit_export.names import WHOLE, key_of

if TYPE_CHECKING:
    import onnx_ir as ir  # needed to build bundles, not to read them

Kind = Literal["int8", "fp8", "int8-weights", "int4-weights"]
"""What is quantised, and to what; see clipdit_export.precision.quantize."""
Compute = Literal["fp32", "fp16", "bf16"]
KINDS: tuple[Kind, ...] = get_args(Kind)
COMPUTES: tuple[Compute, ...] = get_args(Compute)

ENDS = ("step:latent_in/*", "step:latent_out/*", "modulation:*", "conditioner:pooled_in.*")
"""Kept at least in fp32 where other products are quantised: where the latent enters and leaves, and all that acts through adaLN.
Quantising these costs most and gains nothing (vLLM-Omni #2728 has the images)."""


class Recipe(BaseModel):
    """See the head of this file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Of the variant: fp16, int8 ..."""
    compute: Compute = "fp32"
    """What products run in that are neither quantised nor kept."""
    quantize: Kind | None = None
    smooth: float = Field(default=0.5, ge=0, le=1)
    """SmoothQuant's share that moves from activations to weights; 0 is none."""
    parts: tuple[str, ...] | None = None
    """The parts that are quantised; None is all."""
    keep: tuple[str, ...] = ()
    """Nodes that stay in fp32 and are not quantised, as "part:name" with * and ?."""
    keep_half: tuple[str, ...] = ()
    """Nodes that are not quantised, but run in `compute`."""

    @field_validator("keep", "keep_half")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if ":" not in pattern:
                raise ValueError(f'"{pattern}" names no part; wanted "part:node", such as "step:blocks.0.qkv/*"')
        return patterns

    def stays_high(self, part: str) -> "Callable[[ir.Node], bool]":
        """Whether a node of this part stays in fp32."""
        return lambda node: _matches(self.keep, key_of(part, node))

    def is_not_quantised(self, part: str) -> "Callable[[ir.Node], bool]":
        """Whether a node of this part is left as it is by quantisation."""
        kept = (*self.keep, *self.keep_half, *ENDS)

        def leave(node: "ir.Node") -> bool:
            key = key_of(part, node)
            return not self.quantises(key.partition(":")[0]) or _matches(kept, key)

        return leave

    def quantises(self, part: str) -> bool:
        """Whether anything in this part is quantised; in a graph of all parts, whether the step is."""
        asked = "step" if part.startswith(WHOLE) else part
        return self.quantize is not None and (self.parts is None or asked in self.parts)


def _matches(patterns: tuple[str, ...], key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def default_recipe(precision: str) -> Recipe:
    """The recipe behind a word of `--precision`. ValueError for one that is unknown."""
    for compute in COMPUTES:
        if precision == compute:
            return Recipe(name=compute, compute=compute)
    for kind in KINDS:
        if precision == kind:
            # int8 is for CPUs, whose other products are in fp32; the rest for GPUs, where they are in fp16
            compute = "fp32" if kind == "int8" else "fp16"
            return Recipe(name=kind, compute=compute, quantize=kind, parts=("step", "image_encoder"))
    raise ValueError(f"precision is {precision!r}; wanted one of {', '.join((*COMPUTES, *KINDS))}")


def read_recipe(path: Path) -> Recipe:
    """ValueError, one line, when the file is missing or says something else."""
    try:
        return Recipe.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"there is no recipe {path}; wanted a JSON file such as an export writes beside its graphs") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path} is no recipe: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from error
