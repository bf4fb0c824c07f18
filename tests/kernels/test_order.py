"""Programs of a grid run at once, in no order: what one of them reads, no other may write.

The interpreter runs them one after another, the last of the grid last. Run the other way round they must leave the same bits."""

from collections.abc import Callable

import pytest
import torch
from guarded import DEVICE

from clipdit_kernels import norm
from clipdit_kernels.benchmark.cases import OPERATIONS, OURS, Shape
from clipdit_kernels.launch import interpreted

pytestmark = pytest.mark.skipif(not interpreted(), reason="a GPU chooses the order itself")
SHAPE = Shape(size="S", tokens=36, images=2)


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[int, ...]]]:
    """From its call on, grids run from their last program to their first; returns where the programs are noted."""
    from triton.runtime.interpreter import interpreter_builder as builder

    forwards, seen = builder.set_grid_idx, []

    def reversed_index(x: int, y: int, z: int) -> None:
        seen.append(tuple(size - 1 - i for size, i in zip(builder.grid_dim, (x, y, z), strict=True)))
        forwards(*seen[-1])

    def begin() -> list[tuple[int, ...]]:
        monkeypatch.setattr(builder, "set_grid_idx", reversed_index)
        return seen

    return begin


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("linear-gelu", "linear-fp8")])  # cuBLASLt's alone
@torch.inference_mode()
def test_the_order_of_programs_does_not_matter(name: str, backwards):
    case = OPERATIONS[name](SHAPE, torch.float32)
    inputs = case.make(torch.Generator(DEVICE).manual_seed(0))
    wanted = case.rivals[OURS].call(inputs)
    seen = backwards()
    got = case.rivals[OURS].call(inputs)
    assert len(seen) > 1 and seen[-1] == (0, 0, 0)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_nor_does_it_for_gradients(backwards):
    torch.manual_seed(0)
    x, branch, to_residual, to_normed = torch.randn(4, 2, 40, 48, device=DEVICE)
    gate, scale = torch.randn(2, 2, 1, 48, device=DEVICE)
    given = (x, branch, gate, scale, to_residual, to_normed, "layer", 1e-6)
    wanted = norm._launch_backward(*given)
    seen = backwards()
    got = norm._launch_backward(*given)
    assert len(seen) > 1
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
