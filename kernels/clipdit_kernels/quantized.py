"""A DiT whose linear layers multiply 8-bit integers where what produces their input can emit it so.

In 8 bits: qkv, the queries of cross-attention, and both layers of the MLP: 22 of the 24 N D^2 products of a block, 24 of 28 with
cross-attention. As they were: what leaves attention, whose kernel writes one head at a time and so knows no group of a whole row;
the first and the last layer; and all that acts through adaLN. The checkpoint does not change: weights are quantised when it is
opened.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from torch import Tensor, nn

from clipdit.model import int8_ops as plain
from clipdit.model.dit import Block, DiT
from clipdit.model.int8_ops import GROUP, Int8Rows, Int8Weight, quantize_weight
from clipdit.model.ops import Ops
from clipdit_kernels import int8 as fused


@dataclass(frozen=True)
class Int8Ops:
    """The operations of `clipdit.model.int8_ops`, plain or fused."""

    linear: Callable[..., Tensor]
    gelu_mlp: Callable[..., Tensor]
    norm_modulate: Callable[..., Int8Rows]
    gate_residual_norm_modulate: Callable[..., tuple[Tensor, Int8Rows]]


PLAIN_INT8, FUSED_INT8 = (
    Int8Ops(module.linear, module.gelu_mlp, module.norm_modulate, module.gate_residual_norm_modulate) for module in (plain, fused)
)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is 8-bit integers, and that takes rows of them."""

    numbers: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear, linear: Callable[..., Tensor]):
        super().__init__()
        numbers, scales = quantize_weight(layer.weight.detach())
        self.register_buffer("numbers", numbers)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", layer.bias.detach())
        self.dtype, self._linear = layer.weight.dtype, linear

    @property
    def weight(self) -> Int8Weight:
        return Int8Weight(self.numbers, self.scales)

    def forward(self, x: Int8Rows) -> Tensor:
        return self._linear(x, self.weight, self.bias, self.dtype)


def why_not(dit: DiT) -> str | None:
    """Why this model cannot run in 8 bits, in a line; None when it can."""
    if dit.config["mlp"] != "gelu":
        return f"its MLP is {dit.config['mlp']}; int8 has kernels for gelu alone. Use bf16"
    hidden = int(dit.config["width"] * dit.config["mlp_ratio"])
    for name, width in (("the model", dit.config["width"]), ("its MLP", hidden)):
        if width % GROUP:
            return f"{name} is {width} wide; int8 wants a multiple of {GROUP}, which share a scale. Use bf16"
    return None


def quantize(dit: DiT, ops: Ops, int8: Int8Ops) -> None:
    """Replace the layers of `dit` in place; `ops` are for what stays as it is.

    ValueError for a model that cannot."""
    if (reason := why_not(dit)) is not None:
        raise ValueError(reason)
    dit.use(
        replace(
            ops,
            norm_modulate=int8.norm_modulate,
            gate_residual_norm_modulate=int8.gate_residual_norm_modulate,
            gelu_mlp=partial(int8.gelu_mlp, dtype=dit.dtype),
        )
    )
    blocks = list(cast(Iterable[Block], dit.blocks))
    for block in blocks:
        for owner, name in ((block, "qkv"), (block, "fc1"), (block, "fc2"), (block.cross, "q")):
            if owner is not None:
                setattr(owner, name, QuantizedLinear(getattr(owner, name), int8.linear))
    # the last layer reads numbers as they are
    blocks[-1].ops = replace(blocks[-1].ops, end_block=ops.gate_residual_norm_modulate)
