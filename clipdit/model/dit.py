"""The diffusion transformer: DiT (Peebles & Xie 2023) told of the source in up to three ways.

    source latent  --patchify, project (zero at the start)-->  added to the tokens          conditioning "concat", "both"
    CLIP tokens    --keys and values-->  cross-attention of every n-th block                conditioning "clip", "both"
    CLIP embedding --project-->  added to the time embedding, acts through adaLN            conditioning "clip", "both"

The paper's own way is conditioning "clip" without cross-attention. Adding a projection of the source latent to the tokens is the
same linear map as concatenating it on the channels, but it depends on the source alone, so it is computed once per image.

Everything that does not change inside the sampling loop is split off: `context` (once per image) and `modulation` (once per
image and time, so for all steps before the first). `forward` is the three in a row.
"""

from collections.abc import Iterable
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  (diffusers looks beside a class for how to load it)
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipdit.backend import Condition
from clipdit.model import ops
from clipdit.model.network import Context, Modulation, Network
from clipdit.model.ops import PLAIN, Ops
from clipdit.shapes import ClipTokens, Latent, Time, Tokens

Conditioning = Literal["clip", "concat", "both"]
Norm = Literal["layer", "rms"]
Positions = Literal["rope", "sincos"]
MLP = Literal["gelu", "swiglu"]
Normed = Any
"""Tokens as the operations emit them for the linear layers behind a norm: (B, N, D), or 8-bit integers with their scales."""

SIZES = {  # name: (width, depth, heads), Peebles & Xie 2023, table 1; Ti as in ViT
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear: time features or a CLIP embedding to the width of the model."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.up = nn.Linear(in_width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B I"]) -> Float[Tensor, "B D"]:
        return self.down(F.silu(self.up(x)))


class CrossAttention(nn.Module):
    """Reads the CLIP tokens. The output projection starts at zero, so that a fresh block adds nothing."""

    ops = PLAIN

    def __init__(self, width: int, heads: int, token_width: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(token_width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, tokens: ClipTokens) -> tuple[Tensor, Tensor]:
        k, v = self.kv(ops.rms_norm(tokens)).chunk(2, dim=-1)  # each (B, M, D)
        return k, v

    def forward(self, x: Normed, k: Tensor, v: Tensor) -> Tokens:
        return self.out(self.ops.attention(self.q(x), k, v, heads=self.heads))


class Block(nn.Module):
    """Self-attention, cross-attention (if the block has one), MLP; each a residual branch (adaLN-Zero)."""

    ops = PLAIN

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, norm: Norm, mlp: MLP, token_width: int | None):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.heads, self.norm, self.gated = heads, norm, mlp == "swiglu"
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.q_norm = nn.Parameter(torch.ones(width // heads)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(width // heads)) if qk_norm else None
        self.cross = CrossAttention(width, heads, token_width) if token_width else None
        self.fc1 = nn.Linear(width, 2 * hidden if self.gated else hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(
        self,
        x: Tokens,
        normed: Normed,
        modulation: Float[Tensor, "B six D"],
        following: Float[Tensor, "B two D"],
        keys_values: tuple[Tensor, Tensor] | None,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tokens, Normed]:
        """x and its modulated norm -> the same for what comes next, whose shift and scale are `following`. A norm belongs to the
        end of the branch before it: one pass over the tokens, not two. It is in whatever form `ops` emit and the layers take."""
        ops, norm = self.ops, self.norm
        _, _, gate1, shift2, scale2, gate2 = modulation.split(1, dim=1)  # each (B, 1, D)
        branch = self.out(
            ops.qkv_attention(self.qkv(normed), heads=self.heads, q_weight=self.q_norm, k_weight=self.k_norm, rotary=rotary)
        )
        if self.cross is not None and keys_values is not None:
            x, normed = ops.gate_residual_norm_modulate(x, branch, gate1, None, None, norm=norm)
            branch, gate1 = self.cross(normed, *keys_values), None
        x, normed = ops.gate_residual_norm_modulate(x, branch, gate1, shift2, scale2, norm=norm)
        mlp = ops.swiglu_mlp if self.gated else ops.gelu_mlp
        branch = mlp(normed, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        shift, scale = following.split(1, dim=1)
        end = ops.end_block or ops.gate_residual_norm_modulate
        return end(x, branch, gate2, shift, scale, norm=norm)


class DiT(Network):
    """A DiT over (B, C, h, w) latents.

    Args:
        latent_channels: C.
        patch: cells of the latent in one token, along one side.
        width: D; a multiple of `heads`. `depth`: blocks. `heads`: attention heads.
        mlp_ratio: hidden width of the MLP over D. `mlp`: "gelu" is DiT's; "swiglu" has a gate, so three matrices, and at 8/3 as
            many parameters as "gelu" at 4.
        conditioning: how the source reaches the network; see the head of this file.
        cross_attention_every: a block in so many reads the CLIP tokens, the first one does; 0 is never (the paper).
        clip_token_width: E. `clip_embedding_width`: P. Unused with conditioning "concat".
        qk_norm: RMSNorm on queries and keys. `norm`: the normalisation before each branch. `positions`: "rope" takes any size
            well, "sincos" is DiT's.
    """

    ops = PLAIN
    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (accelerate reads a list)

    @register_to_config
    def __init__(
        self,
        *,
        latent_channels: int = 4,
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        conditioning: Conditioning = "both",
        cross_attention_every: int = 1,
        clip_token_width: int = 768,
        clip_embedding_width: int = 512,
        qk_norm: bool = True,
        norm: Norm = "layer",
        positions: Positions = "rope",
        mlp: MLP = "gelu",
    ):
        super().__init__()
        for name, given, known in (
            ("conditioning", conditioning, Conditioning),
            ("norm", norm, Norm),
            ("positions", positions, Positions),
            ("mlp", mlp, MLP),
        ):
            if given not in get_args(known):
                raise ValueError(f"{name} is {given!r}; wanted one of {', '.join(get_args(known))}")
        if min(latent_channels, patch, width, depth, heads) < 1 or cross_attention_every < 0:
            raise ValueError("latent_channels, patch, width, depth and heads must be at least 1; cross_attention_every, 0")
        if width % heads or (width // heads) % 4:
            raise ValueError(f"width {width} with {heads} heads; the width of a head must be a whole multiple of 4")
        self.reads_clip = conditioning in ("clip", "both")
        self.reads_latent = conditioning in ("concat", "both")
        self.gradient_checkpointing = False
        patch_width = latent_channels * patch * patch

        self.latent_in = nn.Linear(patch_width, width)
        self.source_in = nn.Linear(patch_width, width, bias=False) if self.reads_latent else None
        self.time_in = MLPEmbedder(256, width)
        self.pooled_in = MLPEmbedder(clip_embedding_width, width) if self.reads_clip else None
        self.modulation_in = nn.Linear(width, 6 * width)
        self.modulation_table = nn.Parameter(torch.zeros(depth, 6, width))  # adaLN-single, Chen et al. 2023 (PixArt-alpha)
        every = cross_attention_every if self.reads_clip else 0
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, qk_norm, norm, mlp, clip_token_width if every and i % every == 0 else None)
            for i in range(depth)
        )
        self.final_in = nn.Linear(width, 2 * width)
        self.latent_out = nn.Linear(width, patch_width)
        self.initialize()

    def initialize(self) -> None:
        """DiT's: Xavier for linear layers; zero for what ends a branch or speaks for the source: a block starts as identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedder in (self.time_in, self.pooled_in):
            if embedder is not None:
                nn.init.normal_(embedder.up.weight, std=0.02)
                nn.init.normal_(embedder.down.weight, std=0.02)
        zero = [self.modulation_in, self.final_in, self.latent_out, self.source_in]
        zero += [block.cross.out for block in cast(Iterable[Block], self.blocks) if block.cross is not None]
        for module in zero:
            if module is not None:
                nn.init.zeros_(module.weight)

    def use(self, ops: Ops) -> None:
        """Compute with these operations, such as fused ones, from now on. Parameters and checkpoints do not change."""
        for module in self.modules():
            if isinstance(module, DiT | Block | CrossAttention):
                module.ops = ops

    def context(self, condition: Condition) -> Context:
        """What the blocks read of the source; once per image."""
        tokens, pooled = condition.tokens, condition.pooled
        blocks = cast(Iterable[Block], self.blocks)
        return Context(
            source_tokens=self.source_in(ops.patchify(condition.latent, self.config["patch"])) if self.source_in else None,
            pooled=self.pooled_in(ops.rms_norm(pooled)) if self.pooled_in else None,
            keys_values=tuple(b.cross.keys_values(tokens) if b.cross is not None else None for b in blocks),
        )

    def modulation(self, t: Time, context: Context) -> Modulation:
        """adaLN's shifts, scales and gates at t; once per image and time."""
        embedding = self.time_in(ops.time_features(t, 256).to(self.modulation_table.dtype))  # (B, D)
        if context.pooled is not None:
            embedding = embedding + context.pooled
        embedding = F.silu(embedding)
        shared = self.modulation_in(embedding).unflatten(-1, (6, -1))  # (B, 6, D)
        return Modulation(
            blocks=shared[:, None] + self.modulation_table,
            final=self.final_in(embedding).unflatten(-1, (2, -1)),
        )

    def positions(self, height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
        """What tells tokens where they are, for a latent of this size, cells; once per size. Rotary cos and sin, (N, d) each, or
        the one (N, D) that is added to the tokens."""
        rows, columns = height // self.config["patch"], width // self.config["patch"]
        if self.config["positions"] == "rope":
            return ops.rotary_positions(rows, columns, self.config["width"] // self.config["heads"], device)
        return (ops.sincos_positions(rows, columns, self.config["width"], device),)

    def forward_prepared(
        self, x: Latent, modulation: Modulation, context: Context, positions: tuple[Tensor, ...] | None = None
    ) -> Latent:
        """The part of the network that must run at every step. (B, C, h, w) -> (B, C, h, w). `positions` None are computed."""
        patch, (height, width) = self.config["patch"], x.shape[-2:]
        if positions is None:
            positions = self.positions(height, width, x.device)
        return ops.unpatchify(self.forward_tokens(ops.patchify(x, patch), modulation, context, positions), patch, height, width)

    def forward_tokens(
        self, x: Float[Tensor, "B N K"], modulation: Modulation, context: Context, positions: tuple[Tensor, ...]
    ) -> Float[Tensor, "B N K"]:
        """`forward_prepared` between `ops.patchify` and `ops.unpatchify`."""
        norm = self.config["norm"]
        tokens = self.latent_in(x)  # (B, N, D)
        if context.source_tokens is not None:
            tokens = tokens + context.source_tokens
        if self.config["positions"] == "sincos":
            tokens, rotary = tokens + positions[0].to(tokens.dtype), None
        else:
            rotary = (positions[0], positions[1])
        starts = [modulation.blocks[:, i, :2] for i in range(len(self.blocks))]  # (B, 2, D): shift, scale of each first norm
        normed = self.ops.norm_modulate(tokens, *starts[0].split(1, dim=1), norm=norm)
        for i, (block, following) in enumerate(zip(self.blocks, (*starts[1:], modulation.final), strict=True)):
            arguments = (tokens, normed, modulation.blocks[:, i], following, context.keys_values[i], rotary)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens, normed = cast(tuple[Tensor, Tensor], checkpoint(block, *arguments, use_reentrant=False))
            else:
                tokens, normed = block(*arguments)
        return self.latent_out(normed)

    def forward(self, x: Latent, t: Time, condition: Condition) -> Latent:
        """The prediction at (x, t): velocity or noise, as the checkpoint's objective has it. Same shape as x.

        ValueError when x does not divide into patches, or it or the condition is not of the model's channels and widths."""
        self._check(x, condition)
        context = self.context(condition)
        return self.forward_prepared(x, self.modulation(t, context), context)

    def _check(self, x: Latent, condition: Condition) -> None:
        config, channels, height, width = self.config, *x.shape[1:]
        if channels != config["latent_channels"] or height % config["patch"] or width % config["patch"]:
            raise ValueError(
                f"latent is {channels} x {height} x {width}; this model takes {config['latent_channels']} channels and "
                f"sides that are multiples of {config['patch']}"
            )
        if self.reads_latent and condition.latent.shape[1:] != x.shape[1:]:
            got, wanted = (" x ".join(map(str, z.shape[1:])) for z in (condition.latent, x))
            raise ValueError(f"source latent is {got}; wanted that of the latent to predict, {wanted}")
        if self.reads_clip:
            got = (condition.tokens.shape[-1], condition.pooled.shape[-1])
            wanted = (config["clip_token_width"], config["clip_embedding_width"])
            if got != wanted:
                raise ValueError(f"CLIP tokens and embedding have widths {got}; this model takes {wanted}")
