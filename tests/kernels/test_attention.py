"""Attention, self and cross: against the plain operation in float64."""

import pytest
import torch
from bars import close, doubles
from guarded import DEVICE, FINEST, MULTIPLIED, Guarded
from torch import Tensor

from clipdit.model import ops as plain
from clipdit_kernels import attention, fused
from clipdit_kernels.launch import Unsupported, parts_of


def packed(make: Guarded, rows: int, heads: int, d: int, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    cos, sin = (make.put(table.float()) for table in plain.rotary_positions(1, rows, d))
    return {
        "qkv": make.randn(2, rows, 3 * heads * d, dtype=dtype, **options),
        "q_weight": make.randn(d, dtype=dtype, mean=1, std=0.2),
        "k_weight": make.randn(d, dtype=dtype, mean=1, std=0.2),
        "cos": cos,
        "sin": sin,
    }


def both(given: dict[str, Tensor], heads: int, *, norm: bool = True, rotary: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(fused, plain in float64, plain in the same type)."""

    def arguments(tensors: dict[str, Tensor]) -> dict:
        weights = {name: tensors[name] if norm else None for name in ("q_weight", "k_weight")}
        return {"heads": heads, **weights, "rotary": (tensors["cos"], tensors["sin"]) if rotary else None}

    exact = dict(zip(given, doubles(list(given.values())), strict=True))
    with torch.inference_mode():
        return (
            fused.qkv_attention(given["qkv"], **arguments(given)),
            plain.qkv_attention(exact["qkv"], **arguments(exact)),
            plain.qkv_attention(given["qkv"], **arguments(given)),
        )


@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize("rows, heads, d", [(64, 2, 64), (70, 3, 72), (33, 2, 16), (20, 1, 48), (130, 1, 64), (17, 2, 136)])
def test_self_attention_with_norm_and_rotary_positions(rows: int, heads: int, d: int, dtype: torch.dtype):
    make = Guarded()
    got, wanted, like = both(packed(make, rows, heads, d, dtype), heads)
    assert close(got, wanted, like=like) and make.untouched()


@pytest.mark.parametrize("norm, rotary", [(False, False), (True, False), (False, True)])
def test_norm_and_rotary_positions_may_be_missing(norm: bool, rotary: bool):
    make = Guarded()
    got, wanted, like = both(packed(make, 37, 2, 72, FINEST), 2, norm=norm, rotary=rotary)
    assert close(got, wanted, like=like) and make.untouched()


@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize("queries, keys", [(64, 50), (33, 77), (64, 257), (1, 1), (129, 64)])
def test_cross_attention_reads_views_of_a_packed_projection(queries: int, keys: int, dtype: torch.dtype):
    make = Guarded()
    q, kv = make.randn(2, queries, 2 * 72, dtype=dtype), make.randn(2, keys, 4 * 72, dtype=dtype)
    k, v = kv.chunk(2, dim=-1)
    with torch.inference_mode():
        got = fused.attention(q, k, v, heads=2)
        like = plain.attention(q, k, v, heads=2)
    assert close(got, plain.attention(*doubles((q, k, v)), heads=2), like=like) and make.untouched()


def test_scores_far_apart_neither_overflow_nor_lose_the_largest():
    """Logits of hundreds, the largest in the last tile: without rescaling by the running maximum this is NaN or wrong."""
    make = Guarded()
    q, k, v = (make.randn(1, rows, 64, std=std, dtype=FINEST) for rows, std in ((16, 6), (150, 6), (150, 1)))
    k[:, -1] = 20 * q[:, 3] / q[:, 3].norm() * 6
    with torch.inference_mode():
        got, like = fused.attention(q, k, v, heads=1), plain.attention(q, k, v, heads=1)
    assert close(got, plain.attention(*doubles((q, k, v)), heads=1), like=like)


def test_every_image_and_head_reads_its_own():
    make = Guarded()
    q, k, v = (make.randn(3, rows, 64, dtype=FINEST) for rows in (5, 7, 7))
    with torch.inference_mode():
        together = fused.attention(q, k, v, heads=4)
        alone = torch.cat([fused.attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], heads=4) for i in range(3)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    "d, parts", [(64, (64, 0)), (72, (64, 16)), (16, (16, 0)), (96, (64, 32)), (80, (64, 16)), (128, (128, 0))]
)
def test_a_head_is_read_in_two_powers_of_two(d: int, parts: tuple[int, int]):
    assert parts_of(d, 16) == parts


@pytest.mark.parametrize("heads, d, kernel", [(2, 72, True), (3, 72, False), (12, 64, True), (1, 20, False)])
def test_rows_an_odd_distance_apart_are_left_to_pytorch(heads: int, d: int, kernel: bool, monkeypatch: pytest.MonkeyPatch):
    """ptxas 12.8 makes wrong code of the kernel for them, which no interpreter shows."""
    monkeypatch.setattr(attention, "interpreted", lambda: False)
    asked = []
    monkeypatch.setattr(attention, "_launch", lambda *given: asked.append(given) or given[0])
    q, k, v = Guarded().randn(2, 5, 3 * heads * d, dtype=FINEST).chunk(3, dim=-1)
    got = attention._attend(q, k, v, heads)
    assert bool(asked) == kernel
    if not kernel:
        like = plain.attention(q, k, v, heads=heads)
        assert close(got, plain.attention(*doubles((q, k, v)), heads=heads), like=like)


def test_a_view_that_begins_within_16_bytes_is_left_to_pytorch():
    whole = torch.zeros(2, 4, 96, device=DEVICE, dtype=FINEST)
    assert attention.aligned(whole, whole[..., 16:80]) and not attention.aligned(whole, whole[..., 1:65])


Q = torch.zeros(2, 4, 64, device=DEVICE, dtype=FINEST)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"q": Q[0]}, r"q has shape \(4, 64\); wanted \(B, N, heads d\)"),
        ({"q": Q[:0]}, r"q is empty, \(0, 4, 64\)"),
        ({"q": Q.double()}, "q is of torch.float64"),
        ({"k": Q.bfloat16()}, f"k is of torch.bfloat16; wanted {FINEST}, that of the queries"),
        ({"k": Q[:1]}, r"k has shape \(1, 4, 64\); wanted \(2, M, 64\)"),
        ({"v": Q[:, :2]}, r"v has shape \(2, 2, 64\); wanted \(2, 4, 64\), that of k"),
        ({"v": Q.mT.contiguous().mT}, r"v has strides \(256, 1, 4\); wanted neighbours"),
        ({"heads": 8}, "q is 64 wide with 8 heads; wanted heads of 16 to 256 numbers, a multiple of 4"),
        ({"heads": 0}, "heads is 0; wanted at least 1"),
        (
            {"q": torch.zeros(1, 70_000, 16, device=DEVICE, dtype=FINEST), "heads": 1},
            "q has 70,000 tokens; wanted at most 65,536",
        ),
    ],
)
def test_what_the_kernel_does_not_take_is_named(change: dict, said: str):
    with pytest.raises(Unsupported, match=f"attention: {said}"), torch.inference_mode():
        fused.attention(**{"q": Q, "k": Q, "v": Q, "heads": 2} | change)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"qkv": Q[:, :, :62]}, r"qkv has shape \(2, 4, 62\); wanted \(B, N, 3 heads d\)"),
        ({"q_weight": None}, "q_weight or k_weight is None; wanted both"),
        ({"k_weight": Q[0, 0, :8]}, r"k_weight has shape \(8,\).*wanted \(16,\)"),
        ({"rotary": (Q[0, :, :8].float(), Q[0, :, :16].float())}, r"rotary has shape \(4, 8\)"),
        ({"rotary": (Q[0, :, :16].half(), Q[0, :, :16])}, "rotary is of torch.float16; wanted float32"),
    ],
)
def test_what_self_attention_does_not_take_is_named(change: dict, said: str):
    given = {"qkv": Q[:, :, :48].contiguous(), "heads": 1, "q_weight": Q[0, 0, :16], "k_weight": Q[0, 0, :16]}
    with pytest.raises(Unsupported, match=f"qkv_attention: {said}"), torch.inference_mode():
        fused.qkv_attention(**given | change)


def test_it_says_that_it_has_no_gradient():
    with pytest.raises(Unsupported, match="attention: q wants a gradient, which this kernel has not"):
        fused.attention(Q.clone().requires_grad_(), Q, Q, heads=2)
