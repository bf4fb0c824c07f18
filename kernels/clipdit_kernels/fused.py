"""The fused twins under the names and signatures of `clipdit.model.ops`: `DiT.use(FUSED)` computes with them.

Each raises `Unsupported`, a ValueError that names the argument, for what its kernel does not take."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdit.model.dit import DiT
from clipdit.model.ops import PLAIN, Ops, PerImage, Rows
from clipdit_kernels import attention as attentions
from clipdit_kernels import mlp, solver
from clipdit_kernels import norm as norms
from clipdit_kernels.launch import not_multiplied, require_no_gradient, why_not_here


def norm_modulate(x: Rows, shift: PerImage | None, scale: PerImage | None, *, norm: str = "layer", eps: float = 1e-6) -> Rows:
    """See `clipdit.model.ops.norm_modulate`."""
    return norms.alone(x, shift, scale, norm, eps)


def gate_residual_norm_modulate(
    residual: Rows,
    branch: Rows,
    gate: PerImage | None,
    shift: PerImage | None,
    scale: PerImage | None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Rows, Rows]:
    """See `clipdit.model.ops.gate_residual_norm_modulate`."""
    return norms.both(residual, branch, gate, shift, scale, norm, eps)


def attention(q: Rows, k: Tensor, v: Tensor, *, heads: int) -> Rows:
    """See `clipdit.model.ops.attention`. It has no gradient."""
    require_no_gradient("attention", q=q, k=k, v=v)
    return attentions.cross(q, k, v, heads)


def qkv_attention(
    qkv: Tensor,
    *,
    heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Rows:
    """See `clipdit.model.ops.qkv_attention`. It has no gradient."""
    require_no_gradient("qkv_attention", qkv=qkv, q_weight=q_weight, k_weight=k_weight)
    return attentions.packed(qkv, heads, q_weight, k_weight, *(rotary or (None, None)))


def gelu_mlp(x: Rows, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Rows:
    """See `clipdit.model.ops.gelu_mlp`. It has no gradient."""
    require_no_gradient("gelu_mlp", x=x, w1=w1, b1=b1)
    return F.linear(mlp.linear_gelu(x, w1, b1), w2, b2)


def swiglu_mlp(x: Rows, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Rows:
    """See `clipdit.model.ops.swiglu_mlp`. It has no gradient."""
    require_no_gradient("swiglu_mlp", x=x, w1=w1, b1=b1)
    return F.linear(mlp.linear_swiglu(x, w1, b1), w2, b2)


def guided_step(x: Tensor, memory: Tensor, f: Tensor, row: Tensor, *, guidance: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """See `clipdit.model.ops.guided_step`. It has no gradient."""
    require_no_gradient("guided_step", x=x, memory=memory, f=f)
    return solver.step(x, memory, f, row, guidance)


FUSED = Ops(
    norm_modulate=norm_modulate,
    gate_residual_norm_modulate=gate_residual_norm_modulate,
    gelu_mlp=gelu_mlp,
    swiglu_mlp=swiglu_mlp,
    attention=attention,
    qkv_attention=qkv_attention,
)
"""For sampling."""
TRAINING = Ops(norm_modulate=norm_modulate, gate_residual_norm_modulate=gate_residual_norm_modulate)
"""Those that have gradients."""


def for_training(device: torch.device) -> Ops:
    """What `clipdit train --train.fused` computes with. ValueError for a device that kernels do not run on."""
    if (reason := why_not_here(device, instead="leave it out")) is not None:
        raise ValueError(reason)
    return TRAINING


def fused_for(dit: DiT) -> tuple[Ops, dict[str, str]]:
    """The fused operations that take this model, and for each that stays plain why. Never decided in a call: what is not said
    here either runs fused or raises."""
    left: dict[str, str] = {}
    config = dit.config
    head = config["width"] // config["heads"]
    low, high = attentions.HEAD_WIDTHS
    if (reason := not_multiplied(dit.dtype)) is not None:
        left |= dict.fromkeys(("attention", "qkv_attention"), f"the model {reason}")
    if not low <= head <= high:
        left |= dict.fromkeys(("attention", "qkv_attention"), f"a head is {head} wide; the kernel takes {low} to {high}")
    if config["width"] > norms.WIDEST:
        reason = f"the model is {config['width']} wide; the kernel takes {norms.WIDEST}"
        left |= dict.fromkeys(("norm_modulate", "gate_residual_norm_modulate"), reason)
    return replace(FUSED, **{name: getattr(PLAIN, name) for name in left}), left
