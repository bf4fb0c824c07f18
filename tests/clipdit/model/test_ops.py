"""The plain operations, each against its formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding

from clipdit.model import ops
from clipdit.testing import TOLERANCES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(got, wanted):
    """Within the tolerance of the dtype that was computed in; `wanted` is float64."""
    assert got.shape == wanted.shape and got.isfinite().all()
    tolerance = TOLERANCES[got.dtype].relative * (0.1 if got.dtype == torch.float32 else 0.5)  # one operation, not a network
    assert (got.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def normalised(x, norm, eps=1e-6):
    x = x.double()
    centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def softmax_attention(q, k, v, heads):
    """One head and one query at a time."""
    q, k, v = (z.double().unflatten(-1, (heads, -1)) for z in (q, k, v))
    rows = []
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            for h in range(heads):
                scores = k[b, :, h] @ q[b, n, h] / q.shape[-1] ** 0.5
                shares = (scores - scores.max()).exp()
                rows.append(shares / shares.sum() @ v[b, :, h])
    return torch.stack(rows).reshape(q.shape[0], q.shape[1], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_modulate_normalises_rows_then_scales_and_shifts_each_image(norm, dtype):
    x = 3 * randn(2, 5, 24, dtype=dtype) + 1
    shift, scale = (randn(2, 1, 24, seed=s, dtype=dtype) for s in (1, 2))
    wanted = normalised(x, norm) * (1 + scale.double()) + shift.double()
    got = ops.norm_modulate(x, shift, scale, norm=norm)
    assert got.dtype == dtype
    assert_near(got, wanted)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_modulate_keeps_small_differences_on_a_large_mean_and_constant_rows_finite(norm):
    zero = torch.zeros(1, 1, 32)
    x = randn(1, 4, 32) + 30
    assert_near(ops.norm_modulate(x, zero, zero, norm=norm), normalised(x, norm))
    assert ops.norm_modulate(torch.full((1, 2, 32), 7.0), zero, zero, norm=norm).isfinite().all()
    assert torch.equal(ops.norm_modulate(torch.zeros(1, 2, 32), zero, zero, norm=norm), torch.zeros(1, 2, 32))


def test_statistics_are_taken_in_float32_where_float16_would_overflow():
    x = 200 * randn(1, 3, 64, dtype=torch.float16)  # squares reach 1e5, beyond float16
    zero = torch.zeros(1, 1, 64, dtype=torch.float16)
    assert_near(ops.norm_modulate(x, zero, zero, norm="rms"), normalised(x, "rms"))
    assert_near(ops.rms_norm(x, randn(64, seed=1)), normalised(x, "rms") * randn(64, seed=1).double())


def test_gated_residual_keeps_the_dtype_of_the_residual():
    residual, branch, gate = randn(2, 3, 8), randn(2, 3, 8, seed=1, dtype=torch.bfloat16), randn(2, 1, 8, seed=2)
    got = ops.gate_residual(residual, branch, gate)
    assert got.dtype == torch.float32
    assert_near(got, residual.double() + gate.double() * branch.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_end_of_a_branch_and_start_of_the_next_in_one_call(norm, dtype):
    residual, branch = randn(2, 5, 24, dtype=dtype), randn(2, 5, 24, seed=1, dtype=dtype)
    gate, shift, scale = (randn(2, 1, 24, seed=s, dtype=dtype) for s in (2, 3, 4))
    total = residual.double() + gate.double() * branch.double()
    got, normed = ops.gate_residual_norm_modulate(residual, branch, gate, shift, scale, norm=norm)
    assert_near(got, total)
    assert_near(normed, normalised(total, norm) * (1 + scale.double()) + shift.double())


def test_mlp_is_two_linear_layers_around_the_tanh_gelu():
    x, w1, b1, w2, b2 = randn(2, 3, 8), randn(20, 8, seed=1), randn(20, seed=2), randn(8, 20, seed=3), randn(8, seed=4)
    hidden = x.double() @ w1.double().T + b1.double()
    hidden = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    assert_near(ops.gelu_mlp(x, w1, b1, w2, b2), hidden @ w2.double().T + b2.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "queries", "keys"), [(1, 4, 4), (3, 5, 7), (2, 6, 1)])
def test_attention_is_softmax_of_scaled_products_head_by_head(heads, queries, keys, dtype):
    q, k, v = (randn(2, n, 12 * heads, seed=s, dtype=dtype) for s, n in enumerate((queries, keys, keys)))
    assert_near(ops.attention(q, k, v, heads=heads), softmax_attention(q, k, v, heads))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_self_attention_from_the_packed_projection(qk_norm, rope, training):
    heads, d, rows, columns = 2, 8, 2, 3
    qkv = randn(2, rows * columns, 3 * heads * d).requires_grad_(training)
    q, k, v = (z.unflatten(-1, (heads, d)) for z in qkv.detach().double().chunk(3, dim=-1))
    weights = {"q_weight": randn(d, seed=1), "k_weight": randn(d, seed=2)} if qk_norm else {}
    if qk_norm:
        q, k = normalised(q, "rms") * weights["q_weight"].double(), normalised(k, "rms") * weights["k_weight"].double()
    rotary = ops.rotary_positions(rows, columns, d) if rope else None
    if rotary is not None:
        q, k = (turned(z, rows, columns) for z in (q, k))
    wanted = softmax_attention(q.flatten(-2), k.flatten(-2), v.flatten(-2), heads)
    assert_near(ops.qkv_attention(qkv, heads=heads, rotary=rotary, **weights).detach(), wanted)


def turned(z, rows, columns):
    """Axial rotary positions as turns of complex numbers, z is (B, N, heads, d): component i is with component i + d / 2."""
    half = z.shape[-1] // 2
    position = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()  # (N, 2)
    omega = 100.0 ** -(torch.arange(half // 2).double() / (half // 2))
    angle = torch.cat((position[:, :1] * omega, position[:, 1:] * omega), dim=-1)  # (N, d / 2)
    pairs = torch.complex(z[..., :half], z[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((pairs.real, pairs.imag), dim=-1)


@pytest.mark.parametrize(("rows", "columns", "d"), [(3, 4, 8), (1, 5, 12), (4, 2, 64)])
def test_rotary_positions_turn_and_do_not_stretch(rows, columns, d):
    x = randn(2, 3, rows * columns, d)
    cos, sin = ops.rotary_positions(rows, columns, d)
    y = ops.rotate(x, cos, sin)
    assert_near(y.transpose(1, 2), turned(x.double().transpose(1, 2), rows, columns))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(ops.rotate(y, cos, -sin), x)  # and back
    assert torch.equal(y[:, :, 0], x[:, :, 0])  # the corner is where it was


def test_rotary_scores_depend_on_the_offset_alone():
    rows, columns, d = 4, 5, 16
    cos, sin = ops.rotary_positions(rows, columns, d)
    q, k = (randn(1, 1, 1, d, seed=s).expand(1, 1, rows * columns, d).contiguous() for s in (0, 1))
    scores = (ops.rotate(q, cos, sin)[0, 0] @ ops.rotate(k, cos, sin)[0, 0].T).reshape(rows, columns, rows, columns)
    torch.testing.assert_close(scores[:-1, :-1, :-1, :-1], scores[1:, 1:, 1:, 1:])
    assert not torch.allclose(scores[0, 0, 0, 1], scores[0, 0, 1, 0], atol=1e-3)  # down is not across
    assert not torch.allclose(scores[0, 0, 0, 1], scores[0, 1, 0, 0], atol=1e-3)  # right is not left


def test_rotation_is_computed_in_float32():
    x = randn(1, 2, 12, 8, dtype=torch.bfloat16)
    cos, sin = ops.rotary_positions(3, 4, 8)
    assert torch.equal(ops.rotate(x, cos, sin), ops.rotate(x.float(), cos, sin).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (5, 9), (3, 1)])
def test_training_attention_equals_the_fused_one_in_values_and_gradients(queries, keys, dtype):
    q, k, v = (randn(2, 3, n, 8, seed=s, dtype=dtype).requires_grad_() for s, n in enumerate((queries, keys, keys)))
    out, fused = ops.attend(q, k, v), F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert_near(out, fused.detach())
    direction = randn(*out.shape, seed=7, dtype=dtype)
    for got, wanted in zip(
        torch.autograd.grad((out * direction).sum(), (q, k, v)),
        torch.autograd.grad((fused * direction).sum(), (q, k, v)),
        strict=True,
    ):
        scale = wanted.abs().max().clamp(min=1e-3)  # with one key, q and k have no gradient
        assert (got.double() - wanted.double()).abs().max() <= TOLERANCES[dtype].relative * scale


def test_large_scores_do_not_overflow():
    q = torch.full((1, 1, 2, 4), 100.0, requires_grad=True)
    k = torch.stack((torch.full((4,), 100.0), torch.full((4,), -100.0)))[None, None]
    v = torch.tensor([[1.0, 2, 3, 4], [9, 9, 9, 9]])[None, None]
    for out in (ops.attend(q, k, v), ops.attend(q.detach(), k, v)):
        torch.testing.assert_close(out.detach(), v[:, :, :1].expand(1, 1, 2, 4))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_unpatchify_inverts_patchify(patch):
    x = randn(2, 3, 8, 12)
    tokens = ops.patchify(x, patch)
    assert tokens.shape == (2, 96 // patch**2, 3 * patch**2)
    assert torch.equal(ops.unpatchify(tokens, patch, 8, 12), x)


def test_tokens_are_in_row_major_order_with_the_channel_slowest():
    x = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    tokens = ops.patchify(x, 2)
    assert tokens[0, 1].tolist() == [2, 3, 8, 9, 26, 27, 32, 33]  # first row, second column: a square of each channel
    assert tokens[0, 3].tolist() == [12, 13, 18, 19, 36, 37, 42, 43]  # second row, first column


def test_time_features_are_those_of_ddpm_at_1000_t():
    t = torch.tensor([0.0, 0.123, 0.5, 1.0])
    wanted = get_timestep_embedding(1000 * t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(ops.time_features(t, 256), wanted, atol=1e-4, rtol=0)  # angles reach 1000, float32 has 6e-5 there
    assert torch.equal(ops.time_features(t.bfloat16(), 256), ops.time_features(t.bfloat16().float(), 256))


def test_fixed_positions_are_those_of_dit_with_the_axes_exchanged():
    wanted = get_2d_sincos_pos_embed(32, 5, base_size=5, output_type="pt")  # columns first
    wanted = torch.cat((wanted[:, 16:], wanted[:, :16]), dim=-1).float().reshape(5, 5, 32)
    torch.testing.assert_close(ops.sincos_positions(5, 5, 32).reshape(5, 5, 32), wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(ops.sincos_positions(3, 5, 32).reshape(3, 5, 32), wanted[:3], atol=1e-6, rtol=0)


def test_fixed_positions_differ_at_every_place():
    table = ops.sincos_positions(7, 9, 64)
    assert (torch.cdist(table, table) + 10 * torch.eye(63)).min() > 0.5
