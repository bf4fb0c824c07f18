"""Each fused operation at the sizes of published models, with its peers, and the least that it must move and multiply."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdit.model import fp8_ops, int8_ops, ops
from clipdit.model.dit import SIZES
from clipdit.model.int8_ops import GROUP, Int8Rows, dequantize, quantize_rows, quantize_weight
from clipdit.sampling import flow_table
from clipdit_kernels import attention, fp8, int8, mlp, norm, solver
from clipdit_kernels.benchmark import peers
from clipdit_kernels.benchmark.timing import Outputs

OURS = "ours"
KERNEL = "the Triton kernel"
"""Where ours is whichever was faster: the kernel whether it was or not."""
IN_INT8 = "in 8-bit integers"
OTHER_OURS = (KERNEL, IN_INT8)
"""No peers."""
CLIP_TOKENS = 257
"""Of CLIP ViT-L/14 at 224 px."""
CHECKED = 2
"""Sequences whose results are compared with float64; no operation mixes sequences."""

Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model, and what it is given. Guidance makes two sequences of an image."""

    size: str
    """Name in clipdit.model.dit.SIZES."""
    tokens: int
    images: int

    @property
    def width(self) -> int:
        return SIZES[self.size][0]

    @property
    def heads(self) -> int:
        return SIZES[self.size][2]

    @property
    def sequences(self) -> int:
        return 2 * self.images

    @property
    def rows(self) -> int:
        return self.sequences * self.tokens


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A way to compute an operation."""

    call: Callable[[Inputs], Outputs]
    checked: Callable[[Outputs], Sequence[Tensor]] = lambda outputs: [out[:CHECKED] for out in outputs]
    """What is compared with the exact result."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operation at a size."""

    operation: str
    shape: Shape
    dtype: torch.dtype
    make: Callable[[torch.Generator], Inputs]
    exact: Callable[[Inputs], Sequence[Tensor]]
    """In float64, of the first CHECKED sequences."""
    rivals: dict[str, Rival] = field(repr=False)
    """OURS first."""
    bytes_moved: int
    flops: int = 0
    factors: str = "bf16"
    """What is multiplied: a key of `Ceilings.flop_per_s`."""

    @property
    def label(self) -> str:
        shape = self.shape
        return f"{self.operation}, {shape.size}, {shape.tokens} tokens, {shape.images} images"


def draw(generator: torch.Generator, *shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=generator, device=generator.device) * std).to(dtype)


def _modulation(generator: torch.Generator, shape: Shape, dtype: torch.dtype) -> Inputs:
    """gate, shift and scale as a model has them: views into the modulation of a block."""
    rows = draw(generator, shape.sequences, 6, shape.width, dtype=dtype, std=0.3).split(1, dim=1)
    return {"gate": rows[2], "shift": rows[3], "scale": rows[4]}


def _plainly(operation: Callable[..., Any], *names: str, **options: Any) -> Callable[[Inputs], Outputs]:
    """A call that takes its arguments by name from the inputs."""

    def call(inputs: Inputs) -> Outputs:
        made = operation(*(inputs[name] for name in names), **options)
        return tuple(made) if isinstance(made, tuple) else (made,)

    return call


def _exactly(call: Callable[[Inputs], Outputs], *per_sequence: str) -> Callable[[Inputs], Sequence[Tensor]]:
    """`call` in float64 on the first sequences; `per_sequence` names the inputs that have a row for each."""

    def exact(inputs: Inputs) -> Sequence[Tensor]:
        few = {name: tensor[:CHECKED] if name in per_sequence else tensor for name, tensor in inputs.items()}
        return call({name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in few.items()})

    return exact


def branch_norm(shape: Shape, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        x = {name: draw(generator, shape.sequences, shape.tokens, shape.width, dtype=dtype) for name in ("residual", "branch")}
        return x | _modulation(generator, shape, dtype)

    names = ("residual", "branch", "gate", "shift", "scale")
    plain = ops.gate_residual_norm_modulate
    return Case(
        operation="gate_residual_norm_modulate", shape=shape, dtype=dtype, make=make,
        exact=_exactly(_plainly(plain, *names), *names),
        rivals={
            OURS: Rival(call=_plainly(partial(norm._launch_both, norm="layer", eps=1e-6), *names)),
            "eager": Rival(call=_plainly(plain, *names)),
            "Inductor": Rival(call=_plainly(peers.inductor(plain), *names)),
        },
        bytes_moved=4 * shape.rows * shape.width * dtype.itemsize,
    )  # fmt: skip


def norm_alone(shape: Shape, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        x = {"x": draw(generator, shape.sequences, shape.tokens, shape.width, dtype=dtype)}
        return x | _modulation(generator, shape, dtype)

    names, plain = ("x", "shift", "scale"), ops.norm_modulate
    return Case(
        operation="norm_modulate", shape=shape, dtype=dtype, make=make, exact=_exactly(_plainly(plain, *names), *names),
        rivals={
            OURS: Rival(call=_plainly(partial(norm._launch_norm, norm="layer", eps=1e-6), *names)),
            "eager": Rival(call=_plainly(plain, *names)),
            "Inductor": Rival(call=_plainly(peers.inductor(plain), *names)),
        },
        bytes_moved=2 * shape.rows * shape.width * dtype.itemsize,
    )  # fmt: skip


def branch_norm_fp8(shape: Shape, dtype: torch.dtype) -> Case:
    whole = branch_norm(shape, dtype)
    names = ("residual", "branch", "gate", "shift", "scale")

    def plain(*arguments: Tensor) -> tuple[Tensor, ...]:
        residual, rows = fp8_ops.gate_residual_norm_modulate(*arguments)
        return residual, *rows

    def checked(outputs: Outputs) -> Sequence[Tensor]:
        residual, numbers, scales = outputs
        return residual[:CHECKED], fp8_ops.dequantize(fp8_ops.Fp8Rows(numbers[:CHECKED], scales[:CHECKED]))

    rivals = {
        OURS: partial(norm._launch_both_fp8, norm="layer", eps=1e-6),
        "eager": plain,
        "Inductor": peers.inductor(plain),
    }
    return replace(
        whole, operation="gate_residual_norm_modulate to fp8",
        rivals={name: Rival(call=_plainly(call, *names), checked=checked) for name, call in rivals.items()},
        bytes_moved=shape.rows * shape.width * (3 * dtype.itemsize + 1),
    )  # fmt: skip


def branch_norm_int8(shape: Shape, dtype: torch.dtype) -> Case:
    whole = branch_norm(shape, dtype)
    names = ("residual", "branch", "gate", "shift", "scale")

    def plain(*arguments: Tensor) -> tuple[Tensor, ...]:
        residual, rows = int8_ops.gate_residual_norm_modulate(*arguments)
        return residual, *rows

    def checked(outputs: Outputs) -> Sequence[Tensor]:
        residual, numbers, scales = outputs
        return residual[:CHECKED], dequantize(Int8Rows(numbers[:CHECKED], scales[:CHECKED]))

    rivals = {
        OURS: partial(norm._launch_both_int8, norm="layer", eps=1e-6),
        "eager": plain,
        "Inductor": peers.inductor(plain),
    }
    numbers = shape.rows * shape.width
    return Case(
        operation="gate_residual_norm_modulate to int8", shape=shape, dtype=dtype, make=whole.make, exact=whole.exact,
        rivals={name: Rival(call=_plainly(call, *names), checked=checked) for name, call in rivals.items()},
        bytes_moved=numbers * (3 * dtype.itemsize + 1) + 4 * numbers // GROUP,
    )  # fmt: skip


def self_attention(shape: Shape, dtype: torch.dtype) -> Case:
    """As the models have it: QK-norm and rotary positions."""
    width, heads, d = shape.width, shape.heads, shape.width // shape.heads

    def make(generator: torch.Generator) -> Inputs:
        side = int(shape.tokens**0.5)
        cos, sin = ops.rotary_positions(side, shape.tokens // side, d, generator.device)
        return {
            "qkv": draw(generator, shape.sequences, shape.tokens, 3 * width, dtype=dtype),
            "q_weight": 1 + draw(generator, d, dtype=dtype, std=0.1), "k_weight": 1 + draw(generator, d, dtype=dtype, std=0.1),
            "cos": cos, "sin": sin,
        }  # fmt: skip

    def plain(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return ops.qkv_attention(qkv, heads=heads, q_weight=q_weight, k_weight=k_weight, rotary=(cos, sin))

    names = ("qkv", "q_weight", "k_weight", "cos", "sin")
    rivals: dict[str, Callable[..., Tensor]] = {
        OURS: lambda qkv, *others: attention.packed(qkv, heads, *others),
        KERNEL: lambda qkv, *others: attention._launch_packed(qkv, heads, *others),
    }
    rivals |= {f"eager, {name}": peers.with_attention(name, plain) for name in peers.ATTENTIONS}
    rivals |= {f"Inductor, {name}": peers.with_attention(name, peers.inductor(plain)) for name in list(peers.ATTENTIONS)[:2]}
    return Case(
        operation="qkv_attention", shape=shape, dtype=dtype, make=make, exact=_exactly(_plainly(plain, *names), "qkv"),
        rivals={name: Rival(call=_plainly(call, *names)) for name, call in rivals.items()},
        bytes_moved=4 * shape.rows * width * dtype.itemsize, flops=4 * shape.rows * shape.tokens * width,
    )  # fmt: skip


def _attention(operation: str, shape: Shape, dtype: torch.dtype, make: Callable[[torch.Generator], Inputs], keys: int) -> Case:
    """Softmax attention alone, against everybody else's."""
    heads = shape.heads

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, heads=heads)

    def with_heads(attend: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v: attend(q, k, v, heads)

    rivals: dict[str, Callable[..., Tensor]] = {
        OURS: with_heads(attention.cross),
        KERNEL: with_heads(attention._launch_cross),
    }
    rivals |= {name: peers.with_attention(name, plain) for name in peers.ATTENTIONS}
    rivals |= {"FlexAttention": with_heads(peers.inductor(peers.flex_attention, own_products=True))}
    rivals |= {name: with_heads(attend) for name, attend in peers.PACKAGES.items()}
    names = ("q", "k", "v")
    return Case(
        operation=operation, shape=shape, dtype=dtype, make=make, exact=_exactly(_plainly(plain, *names), *names),
        rivals={name: Rival(call=_plainly(call, *names)) for name, call in rivals.items()},
        bytes_moved=2 * (shape.rows + shape.sequences * keys) * shape.width * dtype.itemsize,
        flops=4 * shape.rows * keys * shape.width,
    )  # fmt: skip


def bare_attention(shape: Shape, dtype: torch.dtype) -> Case:
    """Self-attention without what comes before it; q, k and v are views of one projection."""

    def make(generator: torch.Generator) -> Inputs:
        packed = draw(generator, shape.sequences, shape.tokens, 3 * shape.width, dtype=dtype)
        return dict(zip("qkv", packed.chunk(3, dim=-1), strict=True))

    return _attention("attention", shape, dtype, make, shape.tokens)


def cross_attention(shape: Shape, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        q = draw(generator, shape.sequences, shape.tokens, shape.width, dtype=dtype)
        k, v = draw(generator, shape.sequences, CLIP_TOKENS, 2 * shape.width, dtype=dtype).chunk(2, dim=-1)
        return {"q": q, "k": k, "v": v}

    return _attention("cross-attention", shape, dtype, make, CLIP_TOKENS)


def _linear(generator: torch.Generator, shape: Shape, outputs: int, dtype: torch.dtype) -> Inputs:
    width = shape.width
    return {
        "x": draw(generator, shape.sequences, shape.tokens, width, dtype=dtype),
        "weight": draw(generator, outputs, width, dtype=dtype, std=width**-0.5),
        "bias": draw(generator, outputs, dtype=dtype, std=0.1),
    }


def _linear_bytes(shape: Shape, outputs: int, written: int, itemsize: int) -> int:
    """Of input, weights and result, read or written once; `itemsize` of input and weights."""
    return (shape.rows + outputs) * shape.width * itemsize + written


def linear_gelu(shape: Shape, dtype: torch.dtype) -> Case:
    outputs, names = 4 * shape.width, ("x", "weight", "bias")

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    rivals = {
        OURS: mlp.linear_gelu,  # cuBLASLt's product with bias and GELU behind it
        "eager": plain,
        "Inductor": peers.inductor(plain),
    }
    return Case(
        operation="linear + GELU", shape=shape, dtype=dtype, exact=_exactly(_plainly(plain, *names), "x"),
        make=lambda generator: _linear(generator, shape, outputs, dtype),
        rivals={name: Rival(call=_plainly(call, *names)) for name, call in rivals.items()},
        bytes_moved=_linear_bytes(shape, outputs, shape.rows * outputs * dtype.itemsize, dtype.itemsize),
        flops=2 * shape.rows * shape.width * outputs,
    )  # fmt: skip


def linear_swiglu(shape: Shape, dtype: torch.dtype) -> Case:
    """Hidden width 8/3 of the model's, so that its MLP has as many parameters as one of 4 with GELU."""
    hidden, names = 8 * shape.width // 3, ("x", "weight", "bias")

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.swiglu(F.linear(x, weight, bias))

    rivals = {OURS: mlp.linear_swiglu, "eager": plain, "Inductor": peers.inductor(plain)}
    return Case(
        operation="linear + SwiGLU", shape=shape, dtype=dtype, exact=_exactly(_plainly(plain, *names), "x"),
        make=lambda generator: _linear(generator, shape, 2 * hidden, dtype),
        rivals={name: Rival(call=_plainly(call, *names)) for name, call in rivals.items()},
        bytes_moved=_linear_bytes(shape, 2 * hidden, shape.rows * hidden * dtype.itemsize, dtype.itemsize),
        flops=4 * shape.rows * shape.width * hidden,
    )  # fmt: skip


def _quantized(inputs: Inputs) -> Inputs:
    """x and weight in all the ways that rivals take them."""
    flat = inputs["x"].flatten(0, 1)
    rows, weight = quantize_rows(inputs["x"]), quantize_weight(inputs["weight"])
    made = {"x8": rows.numbers, "x8_scales": rows.scales, "w8": weight.numbers, "w8_scales": weight.scales}
    for name, tensor in (("x", flat), ("w", inputs["weight"])):
        made[f"{name}_int8"], made[f"{name}_int8_scale"] = peers.quantize_whole_rows(tensor, 127, torch.int8)
        made[f"{name}_e4m3"], made[f"{name}_e4m3_scale"] = peers.quantize_whole_rows(tensor, 448, torch.float8_e4m3fn)
    return inputs | made


def linear_int8(shape: Shape, dtype: torch.dtype) -> Case:
    """The projection to queries, keys and values. What it is given is in 8 bits already; errors include that."""
    outputs, bare = 3 * shape.width, ("x", "weight", "bias")

    def ours(*arguments: Tensor) -> Tensor:
        return int8._launch_linear(*arguments, dtype)  # pyright: ignore[reportCallIssue]  (six of them)

    def checked(outputs: Outputs) -> Sequence[Tensor]:  # (rows, F), or (B, N, F)
        return [outputs[0].flatten(0, -2)[: CHECKED * shape.tokens].unflatten(0, (CHECKED, -1))]

    def rival(call: Callable[..., Tensor], *names: str) -> Rival:
        return Rival(call=_plainly(call, *names), checked=checked)

    whole = ("x_int8", "x_int8_scale", "w_int8", "w_int8_scale", "bias")
    floats = ("x_e4m3", "x_e4m3_scale", "w_e4m3", "w_e4m3_scale", "bias")
    return Case(
        operation="linear, int8", shape=shape, dtype=dtype, exact=_exactly(_plainly(F.linear, *bare), "x"), factors="int8",
        make=lambda generator: _quantized(_linear(generator, shape, outputs, dtype)),
        rivals={
            OURS: rival(ours, "x8", "x8_scales", "w8", "w8_scales", "bias"),
            "cuBLAS in bf16": rival(F.linear, *bare),
            "torch._int_mm, Inductor": rival(peers.inductor(peers.int_mm, own_products=True), *whole),
            "torch._scaled_mm, e4m3": rival(peers.scaled_mm, *floats),
        },
        bytes_moved=_linear_bytes(shape, outputs, shape.rows * outputs * dtype.itemsize, 1),
        flops=2 * shape.rows * shape.width * outputs,
    )  # fmt: skip


def linear_fp8(shape: Shape, dtype: torch.dtype) -> Case:
    """The same with 8-bit floats."""
    whole = linear_int8(shape, dtype)
    (name, ours), *others = ((name, rival) for name, rival in whole.rivals.items() if name != "torch._scaled_mm, e4m3")

    def in_fp8(inputs: Inputs) -> Outputs:
        x, scales = (inputs[name].unflatten(0, (shape.sequences, -1)) for name in ("x_e4m3", "x_e4m3_scale"))
        return (fp8.linear_fp8(x, scales, inputs["w_e4m3"], inputs["w_e4m3_scale"][:, 0], inputs["bias"], dtype),)

    return replace(
        whole, operation="linear, fp8", factors="fp8",
        rivals={name: replace(ours, call=in_fp8), IN_INT8: ours, **dict(others)},
    )  # fmt: skip


def linear_gelu_int8(shape: Shape, dtype: torch.dtype) -> Case:
    """8 bits in and out: what the second layer of the MLP reads."""
    outputs, whole = 4 * shape.width, linear_gelu(shape, dtype)

    def checked(outputs: Outputs) -> Sequence[Tensor]:
        numbers, scales = outputs
        return [dequantize(Int8Rows(numbers[:CHECKED], scales[:CHECKED]))]

    return Case(
        operation="linear + GELU, int8", shape=shape, dtype=dtype, exact=whole.exact, factors="int8",
        make=lambda generator: _quantized(_linear(generator, shape, outputs, dtype)),
        rivals={
            OURS: Rival(call=_plainly(int8._launch_gelu, "x8", "x8_scales", "w8", "w8_scales", "bias"), checked=checked),
            **{f"{'cuBLASLt epilogue' if name == OURS else name}, bf16": rival for name, rival in whole.rivals.items()},
        },
        bytes_moved=_linear_bytes(shape, outputs, shape.rows * outputs, 1), flops=2 * shape.rows * shape.width * outputs,
    )  # fmt: skip


def linear_gelu_fp8(shape: Shape, dtype: torch.dtype) -> Case:
    """The same with 8-bit floats: the product, then GELU and the scales of whole rows in a pass of their own."""
    whole = linear_gelu_int8(shape, dtype)

    def ours(inputs: Inputs) -> Outputs:
        x, scales = (inputs[name].unflatten(0, (shape.sequences, -1)) for name in ("x_e4m3", "x_e4m3_scale"))
        hidden = fp8.linear_fp8(x, scales, inputs["w_e4m3"], inputs["w_e4m3_scale"][:, 0], inputs["bias"], dtype)
        return tuple(fp8.gelu_fp8(hidden))

    def checked(outputs: Outputs) -> Sequence[Tensor]:
        numbers, scales = outputs
        return [fp8_ops.dequantize(fp8_ops.Fp8Rows(numbers[:CHECKED], scales[:CHECKED]))]

    others = {name: rival for name, rival in whole.rivals.items() if name != OURS}
    return replace(
        whole, operation="linear + GELU, fp8", factors="fp8",
        rivals={OURS: Rival(call=ours, checked=checked), IN_INT8: whole.rivals[OURS], **others},
    )  # fmt: skip


def guided_step(shape: Shape, dtype: torch.dtype) -> Case:
    """Of latents with 4 channels, in patches of 2 x 2."""
    numbers, guidance = shape.images * shape.tokens * 16, 4.0

    def make(generator: torch.Generator) -> Inputs:
        x, memory = (draw(generator, shape.images, shape.tokens, 16, dtype=torch.float32) for _ in range(2))
        row = flow_table(20, "dpmpp_2m").tensor(generator.device)[10]
        return {"x": x, "memory": memory, "f": draw(generator, shape.sequences, shape.tokens, 16, dtype=dtype), "row": row}

    names = ("x", "memory", "f", "row")
    plain = partial(ops.guided_step, guidance=guidance)
    return Case(
        operation="guided_step", shape=shape, dtype=dtype, make=make, exact=_exactly(_plainly(plain, *names)),
        rivals={
            name: Rival(call=_plainly(call, *names), checked=tuple)
            for name, call in {
                OURS: partial(solver._launch, guidance=guidance), "eager": plain, "Inductor": peers.inductor(plain),
            }.items()
        },
        bytes_moved=numbers * (4 * 4 + 4 * dtype.itemsize),
    )  # fmt: skip


OPERATIONS: dict[str, Callable[[Shape, torch.dtype], Case]] = {
    "branch-norm": branch_norm,
    "norm": norm_alone,
    "branch-norm-int8": branch_norm_int8,
    "branch-norm-fp8": branch_norm_fp8,
    "self-attention": self_attention,
    "bare-attention": bare_attention,
    "cross-attention": cross_attention,
    "linear-gelu": linear_gelu,
    "linear-swiglu": linear_swiglu,
    "linear-int8": linear_int8,
    "linear-fp8": linear_fp8,
    "linear-gelu-int8": linear_gelu_int8,
    "linear-gelu-fp8": linear_gelu_fp8,
    "guided-step": guided_step,
}
"""By the names that `clipdit bench kernels` takes."""


def cases(
    operations: Sequence[str], sizes: Sequence[str], tokens: Sequence[int], images: Sequence[int], dtype: torch.dtype
) -> Iterator[Case]:
    """Every operation at every shape. ValueError for an operation or a size that there is not."""
    for given, known in ((operations, OPERATIONS), (sizes, SIZES)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"there is no {unknown[0]}; there are {', '.join(known)}")
    for name in operations:
        for size in sizes:
            for count in tokens:
                for batch in images:
                    yield OPERATIONS[name](Shape(size=size, tokens=count, images=batch), dtype)
