"""What is compared computes the same, and what it must move and multiply is counted right."""

from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clipdit_kernels.benchmark import cases as module
from clipdit_kernels.benchmark import peers
from clipdit_kernels.benchmark.cases import OPERATIONS, OURS, Case, Shape, cases

SMALL = Shape(size="S", tokens=16, images=1)
EIGHT_BITS = 0.03
"""Of the largest number: what rounding factors to 8 bits may cost; measured 0.004 to 0.02."""
ALLOWED = {
    "torch._int_mm, Inductor": EIGHT_BITS,
    "torch._scaled_mm, e4m3": 0.06,  # 3 bits of mantissa; measured 0.039
}
"""Of the largest number, for rivals that compute something else than the rest."""
ELSEWHERE = {"cuDNN", "memory-efficient of PyTorch", "FlexAttention", *peers.PACKAGES, "torch._scaled_mm, e4m3"}
"""Peers that may not run on a CPU."""


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch: pytest.MonkeyPatch):
    """What Inductor compiles is the operation that it is given; compiling takes minutes."""
    monkeypatch.setattr(peers, "inductor", lambda operation, **options: operation)


def made(name: str, shape: Shape = SMALL, dtype: torch.dtype = torch.float32) -> Case:
    return OPERATIONS[name](shape, dtype)


def outputs_of(case: Case, inputs) -> dict[str, list[torch.Tensor]]:
    found = {}
    for name, rival in case.rivals.items():
        try:
            found[name] = list(rival.checked(rival.call(inputs)))
        except (RuntimeError, ImportError) as error:
            assert any(part in name for part in ELSEWHERE), (name, error)
    return found


@pytest.mark.parametrize("name", OPERATIONS)
def test_ours_and_every_peer_that_runs_here_are_near_float64(name: str):
    case = made(name)
    inputs = case.make(torch.Generator().manual_seed(0))
    exact = case.exact(inputs)
    assert all(tensor.dtype == torch.float64 for tensor in exact)
    found = outputs_of(case, inputs)
    assert next(iter(found)) == OURS
    for rival, results in found.items():
        for got, wanted in zip(results, exact, strict=True):
            assert got.shape == wanted.shape, rival
            error = float((got.double() - wanted).abs().max() / wanted.abs().max())
            assert error < ALLOWED.get(rival, EIGHT_BITS if "int8" in name else 0.06 if "fp8" in name else 1e-5), (rival, error)
    assert any(rival != OURS for rival in found)


@pytest.mark.parametrize("name", OPERATIONS)
def test_rivals_change_nothing_that_the_next_one_reads(name: str):
    case = made(name)
    inputs = case.make(torch.Generator().manual_seed(0))
    before = {key: tensor.clone() for key, tensor in inputs.items()}
    outputs_of(case, inputs)
    assert all(torch.equal(tensor, before[key]) for key, tensor in inputs.items())


READ = {
    "linear-int8": {"x8", "x8_scales", "w8", "w8_scales", "bias"},
    "linear-gelu-int8": {"x8", "x8_scales", "w8", "w8_scales", "bias"},
    "linear-fp8": {"x_e4m3", "x_e4m3_scale", "w_e4m3", "w_e4m3_scale", "bias"},
    "linear-gelu-fp8": {"x_e4m3", "x_e4m3_scale", "w_e4m3", "w_e4m3_scale", "bias"},
}
"""What ours reads where other rivals read other forms of it."""


@pytest.mark.parametrize("name, size", product(OPERATIONS, ["S", "XL"]))
def test_bytes_are_those_of_inputs_and_outputs(name: str, size: str):
    """Vectors, modulation and scales are not counted: less than a twentieth of what there is with 256 tokens."""
    shape = Shape(size=size, tokens=256, images=4)
    case = made(name, shape, torch.bfloat16)
    few = made(name, Shape(size=size, tokens=16, images=1), torch.bfloat16)
    inputs = case.make(torch.Generator().manual_seed(0))
    read = sum(t.numel() * t.element_size() for key, t in inputs.items() if key in READ.get(name, inputs.keys()))
    small = few.make(torch.Generator().manual_seed(0))
    writer = OURS if "int8" in name or "fp8" in name else next(rival for rival in outputs_of(few, small) if rival != OURS)
    outputs = few.rivals[writer].call(small)
    written = sum(t.numel() * t.element_size() for t in outputs) * (shape.rows // few.shape.rows)
    assert case.bytes_moved == pytest.approx(read + written, rel=0.05)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "norm" not in name and name != "guided-step"])
def test_operations_are_those_of_the_products(name: str):
    case = made(name, Shape(size="S", tokens=256, images=1))
    inputs = case.make(torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        case.exact(inputs)  # of two sequences, which are all there are
    assert case.flops == counter.get_total_flops()


def test_what_there_is_not_is_named():
    with pytest.raises(ValueError, match="there is no norms; there are branch-norm, norm, "):
        list(cases(["norms"], ["S"], [16], [1], torch.float32))
    with pytest.raises(ValueError, match="there is no M; there are Ti, S, B, L, XL"):
        list(cases(["norm"], ["M"], [16], [1], torch.float32))


def test_every_operation_meets_every_shape():
    found = list(cases(["norm", "guided-step"], ["S", "XL"], [256, 1024], [1, 64], torch.bfloat16))
    assert len(found) == len({case.label for case in found}) == 16
    assert found[-1].shape == Shape(size="XL", tokens=1024, images=64)
    assert found[-1].shape.sequences == 128  # guidance asks twice


def test_an_attention_of_a_package_that_is_not_here_names_it():
    q = torch.zeros(1, 4, 32)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        peers.from_package("no_such_package", "attend")(q, q, q, 2)


def test_an_attention_of_a_package_gets_heads_in_its_own_layout(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "some_attention.py").write_text(
        "import torch\n"
        "def attend(q, k, v):\n"
        "    assert q.shape == (2, 5, 3, 8), q.shape\n"
        "    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))\n"
        "    return out.transpose(1, 2), None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    q, k, v = torch.randn(3, 2, 5, 24)
    got = peers.from_package("some_attention", "attend")(q, k, v, 3)
    torch.testing.assert_close(got, module.ops.attention(q, k, v, heads=3))
