"""A linear layer with its GELU or its gate."""

import pytest
import torch
from bars import close, doubles
from guarded import DEVICE, FINEST, MULTIPLIED, Guarded

from clipdit.model import ops as plain
from clipdit_kernels import fused, mlp
from clipdit_kernels.launch import Unsupported


@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize("rows, width, hidden", [(64, 64, 128), (70, 72, 200), (3, 96, 24), (5, 1152, 144)])
@pytest.mark.parametrize("name", ["gelu_mlp", "swiglu_mlp"])
def test_an_mlp(name: str, rows: int, width: int, hidden: int, dtype: torch.dtype):
    make = Guarded()
    halves = 2 if name == "swiglu_mlp" else 1
    given = (
        make.randn(2, rows, width, dtype=dtype),
        make.randn(halves * hidden, width, dtype=dtype, std=width**-0.5),
        make.randn(halves * hidden, dtype=dtype),
        make.randn(width, hidden, dtype=dtype, std=hidden**-0.5),
        make.randn(width, dtype=dtype),
    )
    with torch.inference_mode():
        got, like = getattr(fused, name)(*given), getattr(plain, name)(*given)
    assert close(got, getattr(plain, name)(*doubles(given)), like=like) and make.untouched()


@pytest.mark.parametrize("hidden", [8, 200, 1500])
def test_the_gate_alone(hidden: int):
    make = Guarded()
    x = make.randn(2, 3, 2 * hidden)
    assert close(mlp._launch_gate(x), plain.swiglu(x.double())) and make.untouched()


X, W, B = (torch.zeros(shape, device=DEVICE, dtype=FINEST) for shape in ((2, 4, 32), (64, 32), (64,)))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"x": X[0]}, r"x has shape \(4, 32\); wanted \(B, N, D\)"),
        ({"x": X[:0]}, "x is empty"),
        ({"w1": W[:, :16].contiguous()}, r"w1 has shape \(64, 16\), .* wanted rows of 32, contiguous"),
        ({"w1": W.T.contiguous().T}, r"w1 has shape \(64, 32\), strides \(1, 64\)"),
        ({"w1": W.bfloat16()}, f"w1 is of torch.bfloat16; wanted {FINEST}, that of x"),
        ({"b1": B[:3]}, r"b1 has shape \(3,\); wanted \(64,\)"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(change: dict, said: str):
    given = {"x": X, "w1": W, "b1": B, "w2": W.T.contiguous(), "b2": B[:32]} | change
    with pytest.raises(Unsupported, match=f"gelu_mlp: {said}"):
        fused.gelu_mlp(**given)


def test_a_gated_layer_wants_an_even_number_of_rows():
    with pytest.raises(Unsupported, match=r"swiglu_mlp: w1 has shape .* wanted an even number of rows of 32"):
        fused.swiglu_mlp(X, W[:63].contiguous(), B[:63], W[:32].contiguous(), B[:32])


def test_it_says_that_it_has_no_gradient():
    with pytest.raises(Unsupported, match="gelu_mlp: w1 wants a gradient"):
        fused.gelu_mlp(X, W.clone().requires_grad_(), B, W.T.contiguous(), B[:32])
