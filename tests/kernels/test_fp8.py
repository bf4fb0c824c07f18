"""Products of 8-bit floats, and what emits them: against the plain definition and float64."""

import pytest
import torch
from guarded import DEVICE, Guarded

from clipdit.model import fp8_ops as plain
from clipdit.model import ops
from clipdit.model.fp8_ops import DTYPE, LARGEST, Fp8Rows, Fp8Weight
from clipdit_kernels import fp8
from clipdit_kernels.launch import Unsupported

BF16 = torch.bfloat16
STEP = 1 / 16
"""The most that rounding to e4m3 changes a number by, relative to it."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm, width", [("layer", 128), ("rms", 384), ("layer", 200), ("layer", 1152)])
def test_a_norm_leaves_in_8_bit_floats(norm: str, width: int, dtype: torch.dtype):
    make = Guarded()
    residual, branch = make.randn(2, 5, width, dtype=dtype), make.randn(2, 5, width, dtype=dtype)
    gate, shift, scale = make.rows(2, width, 6, dtype=dtype)[:3]
    updated, rows = fp8.gate_residual_norm_modulate(residual, branch, gate, shift, scale, norm=norm)
    alone = fp8.norm_modulate(updated, shift, scale, norm=norm)
    assert make.untouched() and torch.equal(rows.scales, alone.scales)
    assert torch.equal(rows.numbers.view(torch.uint8), alone.numbers.view(torch.uint8))
    wanted = ops.norm_modulate(*(tensor.double() for tensor in (updated, shift, scale)), norm=norm)
    _near(rows, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows, width", [(3, 96), (2, 200), (1, 4608)])
def test_gelu_leaves_in_8_bit_floats(rows: int, width: int, dtype: torch.dtype):
    make = Guarded()
    x = make.randn(2, rows, width, dtype=dtype)
    made = Fp8Rows(*fp8.gelu_fp8(x))
    assert make.untouched()
    _near(made, torch.nn.functional.gelu(x.double(), approximate="tanh"))


@pytest.mark.parametrize("largest", [0.5, 1.0, 2.0, 5.0, 100.0])
def test_the_scale_is_the_largest_after_gelu(largest: float):
    """To all digits, which the numbers themselves do not have."""
    x = Guarded().put(torch.tensor([-largest, 0.1, largest, -3.0]).expand(1, 2, 4).contiguous())
    scales = fp8.gelu_fp8(x)[1]
    wanted = torch.nn.functional.gelu(torch.tensor(largest, dtype=torch.float64), approximate="tanh") / LARGEST
    torch.testing.assert_close(scales.cpu().double(), wanted.expand(1, 2, 1), rtol=1e-5, atol=0)


def _near(made: Fp8Rows, wanted: torch.Tensor) -> None:
    """Each number is at most half a step of e4m3 from what it stands for, and the scale is exact."""
    assert made.numbers.dtype == DTYPE and made.numbers.shape == wanted.shape
    scales = wanted.abs().amax(-1, keepdim=True) / LARGEST
    torch.testing.assert_close(made.scales.double(), scales, rtol=1e-5, atol=0)
    off = (plain.dequantize(made).double() - wanted).abs()
    # below 2^-6 steps are 2^-9
    assert (off <= STEP * wanted.abs() * 1.01 + 2.0**-10 * 1.01 * scales).all()


def product(seed: int = 0, rows: int = 5, width: int = 64, outputs: int = 48) -> tuple[Fp8Rows, Fp8Weight, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(2, rows, width, generator=generator), torch.randn(outputs, width, generator=generator)
    x = x * torch.logspace(-2, 2, rows)[:, None]  # every row has a scale of its own
    weight = weight * torch.logspace(-1, 1, outputs)[:, None]
    bias = torch.randn(outputs, generator=generator)
    on_device = plain.quantize_rows(x), plain.quantize_weight(weight)
    return (*(type(pair)(*(tensor.to(DEVICE) for tensor in pair)) for pair in on_device), bias.to(DEVICE, BF16))


def test_a_product_is_that_of_the_numbers_meant():
    x, weight, bias = product()
    got = fp8.linear(x, weight, bias, BF16)
    rows, columns = plain.dequantize(x).double(), (weight.numbers.double() * weight.scales[:, None].double()).T
    wanted = rows @ columns + bias.double()
    # rounding to bfloat16, and what tensor cores drop of 8-bit products: 2^-15.5 of all terms' sizes on an H200
    allowed = 2**-8 * wanted.abs() + 2**-14 * (rows.abs() @ columns.abs()) + 1e-3
    assert ((got.double() - wanted).abs() <= allowed).all()


def test_an_mlp_is_the_plain_one():
    x, w1, b1 = product(0, width=64, outputs=128)
    _, w2, b2 = product(1, width=128, outputs=64)
    got, wanted = (module.gelu_mlp(x, w1, b1, w2, b2, dtype=BF16) for module in (fp8, plain))
    assert float((got.double() - wanted.double()).norm() / wanted.double().norm()) < 0.01


@pytest.mark.parametrize(
    "change, said",
    [
        ({"x": torch.zeros(2, 5, 64)}, r"x has shape \(2, 5, 64\).*of torch.float32; wanted \(B, N, D\) of e4m3"),
        ({"x": torch.zeros(2, 5, 72).to(DTYPE)}, "x has .* D a multiple of 16"),
        ({"scales": torch.zeros(2, 5, 2)}, r"scales has shape \(2, 5, 2\).*wanted \(2, 5, 1\)"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\).*wanted \(48,\)"),
    ],
)
def test_what_a_product_does_not_take_is_named(change: dict, said: str):
    x, weight, bias = product()
    given = {"x": x.numbers, "scales": x.scales, "weight": weight.numbers, "weight_scales": weight.scales, "bias": bias}
    given |= {name: tensor.to(DEVICE) for name, tensor in change.items()}
    with pytest.raises(Unsupported, match=f"linear: {said}"):
        fp8.linear_fp8(*given.values(), BF16)
