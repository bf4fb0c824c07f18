"""A DiT whose linear layers multiply numbers of 8 bits where what produces their input can emit it so.

In 8 bits: qkv, the queries of cross-attention, and both layers of the MLP: 22 of the 24 N D^2 products of a block, 24 of 28 with
cross-attention. As they were: what leaves attention, which writes one head at a time and so knows no scale of a row; the first
and the last layer; and all that acts through adaLN. The checkpoint does not change: weights are quantised when it is opened.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any, cast

from torch import Tensor, nn

from clipdit.model import fp8_ops, int8_ops
from clipdit.model.dit import Block, DiT
from clipdit.model.ops import Ops
from clipdit_kernels import fp8, int8


@dataclass(frozen=True)
class LowOps:
    """The operations of `clipdit.model.int8_ops` or `clipdit.model.fp8_ops`, plain or fused."""

    name: str
    multiple: int
    """Of what widths have to be."""
    because: str
    """Why."""
    quantize_weight: Callable[[Tensor], Any]
    """To `Int8Weight` or `Fp8Weight`."""
    linear: Callable[..., Tensor]
    gelu_mlp: Callable[..., Tensor]
    norm_modulate: Callable[..., Any]
    gate_residual_norm_modulate: Callable[..., tuple[Tensor, Any]]


def _low(name: str, multiple: int, because: str, plain: ModuleType, module: ModuleType) -> LowOps:
    operations = (module.linear, module.gelu_mlp, module.norm_modulate, module.gate_residual_norm_modulate)
    return LowOps(name, multiple, because, plain.quantize_weight, *operations)


PLAIN_INT8, FUSED_INT8 = (_low("int8", int8_ops.GROUP, "which share a scale", int8_ops, module) for module in (int8_ops, int8))
PLAIN_FP8, FUSED_FP8 = (_low("fp8", fp8.MULTIPLE, "as tensor cores read it", fp8_ops, module) for module in (fp8_ops, fp8))
VARIANTS = {low.name: low for low in (FUSED_INT8, FUSED_FP8)}


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is of 8 bits, and that takes rows of them."""

    numbers: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear, low: LowOps):
        super().__init__()
        weight = low.quantize_weight(layer.weight.detach())
        self._form = type(weight)
        self.register_buffer("numbers", weight.numbers)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("bias", layer.bias.detach())
        self.dtype, self._linear = layer.weight.dtype, low.linear

    @property
    def weight(self) -> tuple[Tensor, ...]:
        return self._form(self.numbers, self.scales)

    def forward(self, x: Any) -> Tensor:
        return self._linear(x, self.weight, self.bias, self.dtype)


def why_not(dit: DiT, low: LowOps) -> str | None:
    """Why this model cannot run so, in a line; None when it can."""
    if dit.config["mlp"] != "gelu":
        return f"its MLP is {dit.config['mlp']}; {low.name} has kernels for gelu alone. Use bf16"
    hidden = int(dit.config["width"] * dit.config["mlp_ratio"])
    for name, width in (("the model", dit.config["width"]), ("its MLP", hidden)):
        if width % low.multiple:
            return f"{name} is {width} wide; {low.name} wants a multiple of {low.multiple}, {low.because}. Use bf16"
    return None


def quantize(dit: DiT, ops: Ops, low: LowOps) -> None:
    """Replace the layers of `dit` in place; `ops` are for what stays as it is.

    ValueError for a model that cannot."""
    if (reason := why_not(dit, low)) is not None:
        raise ValueError(reason)
    dit.use(
        replace(
            ops,
            norm_modulate=low.norm_modulate,
            gate_residual_norm_modulate=low.gate_residual_norm_modulate,
            gelu_mlp=partial(low.gelu_mlp, dtype=dit.dtype),
        )
    )
    blocks = list(cast(Iterable[Block], dit.blocks))
    for block in blocks:
        for owner, name in ((block, "qkv"), (block, "fc1"), (block, "fc2"), (block.cross, "q")):
            if owner is not None:
                setattr(owner, name, QuantizedLinear(getattr(owner, name), low))
    # the last layer reads numbers as they are
    blocks[-1].ops = replace(blocks[-1].ops, end_block=ops.gate_residual_norm_modulate)
