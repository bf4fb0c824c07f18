"""QK-norm and rotary positions of a packed projection: against the plain operations in float64."""

import pytest
import torch
from bars import close, doubles
from einops import rearrange
from guarded import Guarded
from torch import Tensor

from clipdit.model import ops as plain
from clipdit_kernels import rotary

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def wanted(qkv: Tensor, heads: int, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None):
    """(queries, keys) as the plain operations make them."""
    made = []
    for x, weight in zip(qkv.chunk(3, dim=-1)[:2], (q_weight, k_weight), strict=True):
        x = rearrange(x, "B N (heads d) -> B heads N d", heads=heads)
        x = x if weight is None else plain.rms_norm(x, weight)
        x = x if cos is None or sin is None else plain.rotate(x, cos, sin)
        made.append(rearrange(x, "B heads N d -> B N (heads d)"))
    return made


def given(make: Guarded, heads: int, d: int, dtype: torch.dtype, *, norm: bool = True, turned: bool = True, rows: int = 6):
    weights = [make.randn(d, dtype=dtype, mean=1, std=0.3) if norm else None for _ in range(2)]
    # no two columns alike, as rotary positions have them: each has to be read where it stands
    tables = [make.randn(rows, d) if turned else None for _ in range(2)]
    return make.randn(3, rows, 3 * heads * d, dtype=dtype), heads, *weights, *tables


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, d", [(6, 64), (3, 72), (2, 16), (1, 136)])
def test_norm_and_positions_in_one_pass(dtype: torch.dtype, heads: int, d: int):
    make = Guarded()
    arguments = given(make, heads, d, dtype)
    qkv, _, *others = arguments
    exact = wanted(qkv.double(), heads, *doubles(others))
    assert close(rotary._launch(*arguments), exact, like=wanted(*arguments)) and make.untouched()


@pytest.mark.parametrize("norm, turned", [(True, False), (False, True)])
def test_either_may_be_missing(norm: bool, turned: bool):
    make = Guarded()
    arguments = given(make, 3, 72, torch.float32, norm=norm, turned=turned)
    qkv, heads, *others = arguments
    assert close(rotary._launch(*arguments), wanted(qkv.double(), heads, *doubles(others))) and make.untouched()


def test_small_heads_keep_their_digits():
    """Epsilon counts where a head is small."""
    make = Guarded()
    qkv, heads, *others = given(make, 2, 64, torch.float32)
    qkv = make.put(1e-3 * qkv.cpu())
    assert close(rotary._launch(qkv, heads, *others), wanted(qkv.double(), heads, *doubles(others)))


def test_a_projection_may_be_a_view():
    make = Guarded()
    wide = make.randn(2, 6, 2 * 3 * 2 * 16)
    qkv = wide[:, :4, : 3 * 2 * 16]
    _, heads, *others = given(make, 2, 16, torch.float32, rows=4)
    assert close(rotary._launch(qkv, heads, *others), wanted(qkv.double(), heads, *doubles(others))) and make.untouched()
