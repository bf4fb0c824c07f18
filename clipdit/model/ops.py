"""The plain definition of every operation that has, or may get, a fused twin. Pure functions of tensors; no parameters here.

A fused twin has the same name and the same signature, and is tested against what stands here. Widths and shapes follow the
legend in clipdit/shapes.py; `heads` is the number of attention heads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "B N D"]
PerImage = Float[Tensor, "B 1 D"]


def at_least_fp32(x: Tensor) -> Tensor:
    """x, in float32 if it was in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm(x: Rows, *, eps: float = 1e-6) -> Rows:
    """LayerNorm without parameters: adaLN brings scale and shift (Peebles & Xie 2023, sec. 3.2). Statistics in fp32."""
    return F.layer_norm(at_least_fp32(x), x.shape[-1:], eps=eps).to(x.dtype)


def rms_norm(x: Float[Tensor, "*S D"], weight: Float[Tensor, "D"] | None = None, *, eps: float = 1e-6) -> Float[Tensor, "*S D"]:
    """x / rms(x) (Zhang & Sennrich 2019). Statistics in fp32."""
    wide = at_least_fp32(x)
    return F.rms_norm(wide, x.shape[-1:], weight=None if weight is None else weight.to(wide.dtype), eps=eps).to(x.dtype)


def modulate(x: Rows, shift: PerImage, scale: PerImage) -> Rows:
    """adaLN: x * (1 + scale) + shift, one shift and scale an image."""
    return x * (1 + scale) + shift


def norm_modulate(x: Rows, shift: PerImage | None, scale: PerImage | None, *, norm: str = "layer", eps: float = 1e-6) -> Rows:
    """Normalise, then modulate. `norm` is "layer" or "rms"; shift and scale None leave what is normalised as it is."""
    normed = layer_norm(x, eps=eps) if norm == "layer" else rms_norm(x, eps=eps)
    if shift is None or scale is None:
        return normed
    return modulate(normed, shift.to(x.dtype), scale.to(x.dtype))


def gate_residual(residual: Rows, branch: Rows, gate: PerImage | None) -> Rows:
    """residual + gate * branch (adaLN-Zero); gate None is 1. The residual keeps its own dtype: it is where fp16 overflows."""
    branch = branch.to(residual.dtype)
    return residual + (branch if gate is None else gate.to(residual.dtype) * branch)


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
    """The end of one branch and the start of the next in one pass: (new residual, its normalised and modulated copy)."""
    residual = gate_residual(residual, branch, gate)
    return residual, norm_modulate(residual, shift, scale, norm=norm, eps=eps)


def gelu_mlp(x: Rows, w1: Float[Tensor, "F D"], b1: Float[Tensor, "F"], w2: Float[Tensor, "D F"], b2: Float[Tensor, "D"]) -> Rows:
    """fc2(gelu_tanh(fc1(x))), the MLP of DiT."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def swiglu(x: Float[Tensor, "*S two_F"]) -> Float[Tensor, "*S F"]:
    """silu(first half) * second half (Shazeer 2020)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_mlp(
    x: Rows, w1: Float[Tensor, "two_F D"], b1: Float[Tensor, "two_F"], w2: Float[Tensor, "D F"], b2: Float[Tensor, "D"]
) -> Rows:
    """w2 (silu(gate) * up) + b2, with gate and up the two halves of w1 x + b1."""
    return F.linear(swiglu(F.linear(x, w1, b1)), w2, b2)


def rotate(x: Float[Tensor, "B heads N d"], cos: Float[Tensor, "N d"], sin: Float[Tensor, "N d"]) -> Float[Tensor, "B heads N d"]:
    """Rotary positions on adjacent halves (Su et al. 2021): x * cos + rotate_half(x) * sin. Computed in fp32."""
    wide = at_least_fp32(x)
    a, b = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


Heads = Float[Tensor, "B heads N d"]


def attend(q: Heads, k: Float[Tensor, "B heads M d"], v: Float[Tensor, "B heads M d"]) -> Heads:
    """softmax(q k^T / sqrt(d)) v.

    Training on a CPU spells it out: the backward pass of PyTorch's CPU flash attention took two to four times as long as these
    three operations in bfloat16 (torch 2.15, 64 and 256 tokens; docs/speed.md)."""
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        batch, heads, rows, width = q.shape
        scores = torch.baddbmm(
            q.new_zeros(1, 1, 1), q.reshape(-1, rows, width), k.reshape(-1, k.shape[2], width).mT, beta=0, alpha=width**-0.5
        )
        return (scores.softmax(-1).to(v.dtype) @ v.reshape(-1, v.shape[2], width)).reshape(batch, heads, rows, width)
    return F.scaled_dot_product_attention(q, k, v)


def attention(q: Rows, k: Float[Tensor, "B M D"], v: Float[Tensor, "B M D"], *, heads: int) -> Rows:
    """Softmax attention over `heads` heads, self (M = N) or cross; scale 1 / sqrt(head dim)."""
    q, k, v = (rearrange(z, "B N (heads d) -> B heads N d", heads=heads) for z in (q, k, v))
    return rearrange(attend(q, k, v), "B heads N d -> B N (heads d)")


def qkv_attention(
    qkv: Float[Tensor, "B N three_D"],
    *,
    heads: int,
    q_weight: Float[Tensor, "d"] | None = None,
    k_weight: Float[Tensor, "d"] | None = None,
    rotary: tuple[Float[Tensor, "N d"], Float[Tensor, "N d"]] | None = None,
) -> Float[Tensor, "B N D"]:
    """Self-attention from the packed projection: QK-norm (Dehghani et al. 2023), rotary positions, attention."""
    q, k, v = (rearrange(z, "B N (heads d) -> B heads N d", heads=heads) for z in qkv.chunk(3, dim=-1))
    if q_weight is not None:
        q, k = rms_norm(q, q_weight), rms_norm(k, k_weight)
    if rotary is not None:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    return rearrange(attend(q, k, v), "B heads N d -> B N (heads d)")


def patchify(x: Float[Tensor, "B C h w"], patch: int) -> Float[Tensor, "B N K"]:
    """Latent -> tokens in row-major order, K = patch * patch * C with the channel slowest."""
    return rearrange(x, "B C (h p) (w q) -> B (h w) (C p q)", p=patch, q=patch)


def unpatchify(x: Float[Tensor, "B N K"], patch: int, height: int, width: int) -> Float[Tensor, "B C h w"]:
    """The inverse of `patchify`; height and width of the latent, cells."""
    return rearrange(x, "B (h w) (C p q) -> B C (h p) (w q)", p=patch, q=patch, h=height // patch, w=width // patch)


def guided_step(
    x: Float[Tensor, "B *S"],
    memory: Float[Tensor, "B *S"],
    f: Float[Tensor, "A *S"],
    row: Float[Tensor, "6"],
    *,
    guidance: float = 1.0,
) -> tuple[Float[Tensor, "B *S"], Float[Tensor, "B *S"], Float[Tensor, "A *S"]]:
    """Classifier-free guidance (Ho & Salimans 2022), then a row of the sampling table (`clipdit.sampling`), without fresh noise.

    `f` is the network's answer: conditioned, and with guidance other than 1 behind it that to the null condition. `row` is one of
    `SamplingTable.tensor`: time, a, b, c, d, e. Returns x, the memory, and x as the network reads it next: in the type of f and
    as often. x and memory are carried in float32."""
    answer = at_least_fp32(f)
    if guidance != 1.0:
        given, blank = answer.unflatten(0, (2, len(x)))
        answer = blank + guidance * (given - blank)
    _, a, b, c, _, e = row.to(x.dtype)
    after = a * x + b * answer + c * memory
    return after, x + e * answer, after.to(f.dtype).repeat(len(f) // len(x), *[1] * (x.ndim - 1))


def time_features(t: Float[Tensor, "B"], width: int, *, max_period: float = 10_000.0) -> Float[Tensor, "B width"]:
    """Sinusoids of 1000 t (DDPM's range of time steps), cosines first, fp32 (Vaswani et al. 2017, as in DiT)."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = 1000.0 * t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def sincos_positions(rows: int, columns: int, width: int, device: torch.device | None = None) -> Float[Tensor, "N width"]:
    """Fixed 2-D sine-cosine positions, fp32: the row in the first half of the width, the column in the second (He et al. 2022;
    DiT's code has the halves the other way round)."""
    quarter = width // 4
    omega = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    axes = []
    for length in (rows, columns):
        angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * omega
        axes.append(torch.cat((angles.sin(), angles.cos()), dim=-1))
    down = axes[0][:, None].expand(rows, columns, width // 2)
    across = axes[1][None].expand(rows, columns, width // 2)
    return torch.cat((down, across), dim=-1).reshape(rows * columns, width)


def rotary_positions(
    rows: int, columns: int, head_dim: int, device: torch.device | None = None
) -> tuple[Float[Tensor, "N d"], Float[Tensor, "N d"]]:
    """cos and sin of 2-D rotary positions: a quarter of the head turns with the row, a quarter with the column, both halves
    alike (axial RoPE, Heo et al. 2024, base 100 because latents have tens of cells a side, not thousands of words)."""
    quarter = head_dim // 4
    omega = 100.0 ** -(torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    row = torch.arange(rows, dtype=torch.float32, device=device)[:, None, None] * omega
    column = torch.arange(columns, dtype=torch.float32, device=device)[None, :, None] * omega
    angles = torch.cat((row.expand(rows, columns, quarter), column.expand(rows, columns, quarter)), dim=-1)
    angles = angles.reshape(rows * columns, 2 * quarter).repeat(1, 2)
    return angles.cos(), angles.sin()


@dataclass(frozen=True)
class Ops:
    """Those of the operations above that a `DiT` calls and that have fused twins. `DiT.use` exchanges them, parameters stay."""

    norm_modulate: Callable[..., Rows] = norm_modulate
    gate_residual_norm_modulate: Callable[..., tuple[Rows, Rows]] = gate_residual_norm_modulate
    gelu_mlp: Callable[..., Rows] = gelu_mlp
    swiglu_mlp: Callable[..., Rows] = swiglu_mlp
    attention: Callable[..., Rows] = attention
    qkv_attention: Callable[..., Rows] = qkv_attention
    end_block: Callable[..., tuple[Rows, Rows]] | None = None
    """`gate_residual_norm_modulate` to what comes behind a block, where that wants its rows otherwise; None is the same."""


PLAIN = Ops()
