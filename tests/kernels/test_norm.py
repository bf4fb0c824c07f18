"""residual + gate * branch, norm, modulate: against the plain operation in float64, on what breaks such kernels."""

from itertools import product

import pytest
import torch
from bars import close, doubles
from guarded import DEVICE, Guarded
from torch import Tensor

from clipdit.model import ops as plain
from clipdit.model.int8_ops import GROUP, dequantize
from clipdit_kernels import fused, int8
from clipdit_kernels.launch import Unsupported

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NORMS = ["layer", "rms"]
WIDTHS = [384, 768, 1152, 72, 200]
"""The last is held as 128 + 128: its second part is not full."""


@pytest.mark.parametrize("dtype, norm, width", [*product(DTYPES, NORMS, WIDTHS)])
def test_branch_norm_and_modulation_in_one_pass(dtype: torch.dtype, norm: str, width: int):
    make = Guarded()
    residual, branch = make.randn(3, 5, width, dtype=dtype), make.randn(3, 5, width, dtype=dtype)
    gate, shift, scale = make.rows(3, width, 6, dtype=dtype)[1:4]
    given = (residual, branch, gate, shift, scale)
    got = fused.gate_residual_norm_modulate(*given, norm=norm)
    wanted = plain.gate_residual_norm_modulate(*doubles(given), norm=norm)
    assert close(got, wanted, like=plain.gate_residual_norm_modulate(*given, norm=norm)) and make.untouched()


@pytest.mark.parametrize("dtype, norm, modulated", [*product(DTYPES, NORMS, [True, False])])
def test_norm_alone_with_and_without_modulation(dtype: torch.dtype, norm: str, modulated: bool):
    make = Guarded()
    x = make.randn(2, 7, 384, dtype=dtype)
    shift, scale = make.rows(2, 384, 2, dtype=dtype) if modulated else (None, None)
    got = fused.norm_modulate(x, shift, scale, norm=norm)
    wanted = plain.norm_modulate(*doubles((x, shift, scale)), norm=norm)
    assert close(got, wanted, like=plain.norm_modulate(x, shift, scale, norm=norm)) and make.untouched()


@pytest.mark.parametrize("gated, modulated", [*product([True, False], repeat=2)])
def test_gate_and_modulation_may_be_missing(gated: bool, modulated: bool):
    make = Guarded()
    residual, branch = make.randn(2, 3, 96), make.randn(2, 3, 96)
    gate, shift, scale = make.rows(2, 96, 3)
    given = (residual, branch, gate if gated else None, *((shift, scale) if modulated else (None, None)))
    got = fused.gate_residual_norm_modulate(*given)
    assert close(got, plain.gate_residual_norm_modulate(*doubles(given))) and make.untouched()


@pytest.mark.parametrize(
    "norm, mean, std", [("layer", 300.0, 1.0), ("layer", 0.0, 1e-3), ("rms", 0.0, 1e-3), ("layer", 1e3, 1e-2)]
)
def test_large_means_and_small_deviations_keep_their_digits(norm: str, mean: float, std: float):
    make = Guarded()
    x = make.randn(2, 3, 768, mean=mean, std=std)
    got, wanted = fused.norm_modulate(x, None, None, norm=norm), plain.norm_modulate(x.double(), None, None, norm=norm)
    like = plain.norm_modulate(x, None, None, norm=norm)
    assert close(got, wanted, like=like)


def test_a_row_of_equal_numbers_is_zero_not_nan():
    x = Guarded().put(torch.full((1, 2, 96), 7.0))
    assert torch.equal(fused.norm_modulate(x, None, None), torch.zeros_like(x))


def test_half_precision_carries_the_residual_as_it_is_stored():
    """What is normalised is the rounded residual: the next branch finds the same numbers."""
    make = Guarded()
    # about 300 bfloat16 knows even numbers only
    residual, branch = make.randn(1, 4, 96, dtype=torch.bfloat16, mean=300), make.randn(1, 4, 96, dtype=torch.bfloat16)
    updated, normed = fused.gate_residual_norm_modulate(residual, branch, None, None, None)
    assert close(normed, plain.norm_modulate(updated.double(), None, None), like=plain.norm_modulate(updated, None, None))


@pytest.mark.parametrize("dtype, norm, gated, modulated", [*product([torch.float32], NORMS, [True, False], [True, False]),
                                                            (torch.float16, "layer", True, True)])  # fmt: skip
def test_gradients_are_those_of_the_plain_operation(dtype: torch.dtype, norm: str, gated: bool, modulated: bool):
    make = Guarded()
    rows = 19  # more than one program adds up, the last one not full
    residual, branch = make.randn(2, rows, 96, dtype=dtype), make.randn(2, rows, 96, dtype=dtype)
    gate, shift, scale = make.rows(2, 96, 3, dtype=dtype)
    given = (residual, branch, gate if gated else None, *((shift, scale) if modulated else (None, None)))
    weights = make.randn(2, rows, 96), make.randn(2, rows, 96)

    def gradients(operation, tensors) -> list[Tensor]:
        tensors = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
        updated, normed = operation(*tensors, norm=norm)
        ((updated * weights[0]).sum() + (normed * weights[1]).sum()).backward()
        return [tensor.grad for tensor in tensors if tensor is not None]

    got = gradients(fused.gate_residual_norm_modulate, given)
    wanted = gradients(plain.gate_residual_norm_modulate, doubles(given))
    assert close(got, wanted, like=gradients(plain.gate_residual_norm_modulate, given)) and make.untouched()


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_of_the_norm_alone(norm: str):
    make = Guarded()
    x, (shift, scale) = make.randn(2, 17, 96), make.rows(2, 96, 2)

    def gradients(operation, tensors) -> list[Tensor]:
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        (operation(*tensors, norm=norm) ** 3).sum().backward()
        return [tensor.grad for tensor in tensors]

    assert close(gradients(fused.norm_modulate, (x, shift, scale)), gradients(plain.norm_modulate, doubles((x, shift, scale))))


X = torch.zeros(2, 3, 8, device=DEVICE)
ROW = torch.zeros(2, 1, 8, device=DEVICE)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"residual": X.double()}, "residual is of torch.float64; wanted float32, bfloat16 or float16"),
        ({"residual": X[0]}, r"residual has shape \(3, 8\); wanted \(B, N, D\)"),
        ({"residual": X[:, :0]}, r"residual is empty, \(2, 0, 8\)"),
        ({"residual": X.mT.contiguous().mT}, r"residual has strides \(24, 1, 3\); wanted contiguous rows"),
        ({"branch": X[:, :2].contiguous()}, r"branch has shape \(2, 2, 8\); wanted \(2, 3, 8\)"),
        ({"gate": ROW[:1]}, r"gate has shape \(1, 1, 8\); wanted \(2, 1, 8\), one row an image"),
        ({"scale": ROW.int()}, "scale is of torch.int32"),
        ({"shift": torch.zeros(2, 8, 2, device=DEVICE)[:, None, :, 0]}, "shift has strides"),
        ({"shift": None}, "shift and scale: one is None; wanted both or none"),
        ({"norm": "batch"}, "norm is 'batch'; wanted layer or rms"),
        ({"residual": torch.zeros(1, 1, 9000, device=DEVICE)}, "residual has rows of 9000; wanted at most 8192"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(change: dict, said: str):
    given = {"residual": X, "branch": X, "gate": ROW, "shift": ROW, "scale": ROW} | change
    with pytest.raises(Unsupported, match=f"gate_residual_norm_modulate: {said}"):
        fused.gate_residual_norm_modulate(**given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [128, 384, 896, 1152])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_norm_leaves_in_8_bits(norm: str, width: int, dtype: torch.dtype):
    make = Guarded()
    residual, branch = make.randn(2, 5, width, dtype=dtype), make.randn(2, 5, width, dtype=dtype)
    gate, shift, scale = make.rows(2, width, 6, dtype=dtype)[:3]
    updated, rows = int8.gate_residual_norm_modulate(residual, branch, gate, shift, scale, norm=norm)
    alone = int8.norm_modulate(updated, shift, scale, norm=norm)
    assert make.untouched() and all(torch.equal(a, b) for a, b in zip(rows, alone, strict=True))
    doubled = [tensor.double() for tensor in (updated, shift, scale)]
    wanted = plain.norm_modulate(*doubled, norm=norm)
    step = wanted.unflatten(-1, (-1, GROUP)).abs().amax(-1) / 127
    torch.testing.assert_close(rows.scales.double(), step, rtol=1e-5, atol=1e-9)
    errors = (dequantize(rows).double() - wanted).unflatten(-1, (-1, GROUP)).abs() / step[..., None]
    assert errors.max() <= 0.501
    exact = plain.gate_residual(residual.double(), branch.double(), gate.double())
    assert close(updated, exact, like=plain.gate_residual(residual, branch, gate))


def test_a_norm_of_an_uneven_width_is_refused():
    x = torch.zeros(1, 2, 96, device=DEVICE)
    with pytest.raises(Unsupported, match="norm_modulate: x has rows of 96; wanted a multiple of 128"):
        int8.norm_modulate(x, None, None)
