"""Products of 8-bit integers."""

import pytest
import torch
from bars import close
from guarded import DEVICE, Guarded
from torch import Tensor

from clipdit.model import int8_ops as plain
from clipdit.model.int8_ops import GROUP, Int8Rows, Int8Weight
from clipdit_kernels import int8
from clipdit_kernels.launch import Unsupported


def given(make: Guarded, rows: int, width: int, columns: int, dtype: torch.dtype) -> tuple[Int8Rows, Int8Weight, Tensor]:
    x = plain.quantize_rows(torch.randn(2, rows, width, generator=torch.Generator().manual_seed(rows)) * 3)
    weight = plain.quantize_weight(torch.randn(columns, width, generator=torch.Generator().manual_seed(columns)))
    bias = make.randn(columns, dtype=dtype)
    return Int8Rows(*map(make.put, x)), Int8Weight(*map(make.put, weight)), bias


def exact(x: Int8Rows, weight: Int8Weight, bias: Tensor) -> Tensor:
    """In float64."""
    numbers = x.numbers.double().unflatten(-1, (-1, GROUP)) * x.scales.double()[..., None]
    return numbers.flatten(-2) @ (weight.numbers.double() * weight.scales.double()[:, None]).T + bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows, width, columns", [(64, 128, 128), (37, 384, 200), (5, 1152, 72)])
def test_a_linear_layer_is_exact_but_for_the_last_rounding(rows: int, width: int, columns: int, dtype: torch.dtype):
    make = Guarded()
    x, weight, bias = given(make, rows, width, columns, dtype)
    wanted = exact(x, weight, bias)
    assert close(int8.linear(x, weight, bias, dtype), wanted) and make.untouched()
    assert close(plain.linear(x, weight, bias, dtype), wanted)


@pytest.mark.parametrize("rows, width, hidden", [(64, 128, 256), (37, 384, 128)])
def test_gelu_leaves_in_8_bits(rows: int, width: int, hidden: int):
    make = Guarded()
    x, weight, bias = given(make, rows, width, hidden, torch.float32)
    got = Int8Rows(*int8.linear_gelu_int8(*x, *weight, bias))
    wanted = torch.nn.functional.gelu(exact(x, weight, bias), approximate="tanh")
    step = wanted.unflatten(-1, (-1, GROUP)).abs().amax(-1) / 127
    torch.testing.assert_close(got.scales.double(), step, rtol=1e-5, atol=1e-9)
    errors = (plain.dequantize(got).double() - wanted).unflatten(-1, (-1, GROUP)).abs() / step[..., None]
    assert errors.max() <= 0.501 and make.untouched()  # half a step is the rounding


@pytest.mark.parametrize("ops", [plain, int8], ids=["plain", "fused"])
def test_an_mlp_in_8_bits_is_near_the_one_in_float(ops):
    make = Guarded()
    generator = torch.Generator().manual_seed(0)
    x, w1, b1 = given(make, 20, 128, 256, torch.float32)
    w2 = torch.randn(128, 256, generator=generator).to(DEVICE)
    second = Int8Weight(*map(make.put, plain.quantize_weight(w2)))
    b2 = make.randn(128)
    got = ops.gelu_mlp(x, w1, b1, second, b2, dtype=torch.float32)
    wanted = torch.nn.functional.gelu(exact(x, w1, b1), approximate="tanh") @ w2.double().T + b2.double()
    relative = (got.double() - wanted).norm() / wanted.norm()
    assert 1e-4 < relative < 0.02 and make.untouched()


def test_a_channel_that_stands_out_costs_its_group_alone():
    x = torch.randn(1, 8, 512, generator=torch.Generator().manual_seed(0))
    x[..., 5] = 300
    errors = (plain.dequantize(plain.quantize_rows(x)) - x).abs().amax((0, 1)).split(GROUP)
    assert errors[0].max() > 0.5 and all(others.max() < 0.02 for others in errors[1:])


def test_a_group_of_zeros_is_zero():
    x = plain.quantize_rows(torch.zeros(1, 2, 256))
    assert not x.numbers.any() and (x.scales < 1e-30).all() and plain.dequantize(x).isfinite().all()


X, S = torch.zeros(2, 4, 128, dtype=torch.int8, device=DEVICE), torch.zeros(2, 4, 1, device=DEVICE)
W, C, B = torch.zeros(64, 128, dtype=torch.int8, device=DEVICE), torch.zeros(64, device=DEVICE), torch.zeros(64, device=DEVICE)


@pytest.mark.parametrize(
    "x, weight, bias, said",
    [
        ((X.int(), S), (W, C), B, r"x has shape .* of torch.int32; wanted \(B, N, D\) of int8"),
        ((X[:, :, :96].contiguous(), S), (W, C), B, "x has shape .* D a multiple of 128"),
        ((X[:0], S[:0]), (W, C), B, "x has shape"),
        ((X, S[:1]), (W, C), B, r"scales has shape \(1, 4, 1\)"),
        ((X, S), (W.mT.contiguous().mT, C), B, r"weight has shape \(64, 128\), strides \(1, 64\)"),
        ((X, S), (W, C.half()), B, "weight_scales has shape .* of torch.float16; wanted .* of float32"),
        ((X, S), (W, C), B[:3], r"bias has shape \(3,\)"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(x, weight, bias, said: str):
    with pytest.raises(Unsupported, match=f"linear: {said}"):
        int8.linear(Int8Rows(*x), Int8Weight(*weight), bias, torch.float32)


def test_rows_of_an_uneven_width_are_refused():
    with pytest.raises(ValueError, match="rows are 96 wide; wanted a multiple of 128"):
        plain.quantize_rows(torch.zeros(1, 1, 96))
    with pytest.raises(Unsupported, match="gelu_mlp: w1 has 64 rows; wanted a multiple of 128"):
        int8.linear_gelu_int8(X, S, W, C, B)
