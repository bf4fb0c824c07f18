"""Whole loops on a CPU: every way that runs there gives the same latents, and what cannot run is left out."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clipdit.backend import Condition
from clipdit_kernels.benchmark import sampling
from clipdit_kernels.benchmark.cases import Shape
from clipdit_kernels.benchmark.sampling import VARIANTS, flops_of_step, measure, network

CPU = torch.device("cpu")
SHAPE = Shape(size="Ti", tokens=16, images=1)


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch):
    """Two blocks of DiT-Ti: the interpreter is slow."""
    monkeypatch.setitem(sampling.SIZES, "Ti", (192, 2, 3))
    monkeypatch.setattr(sampling, "CLIP_TOKENS", 9)


def run(**options):
    settings = {"dtype": torch.float32, "steps": 2, "seconds": 0.01, "side": 64}
    return measure([SHAPE], CPU, **settings | options)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_way_that_runs_here_ends_at_the_latents_of_float32(shallow, tmp_path):
    out = tmp_path / "sampling.json"
    made = run(variants=["eager", "eager-cudnn", "eager-cudnn-graph", "ours"], out=out)
    (entry,) = made["entries"]
    assert not entry["left_out"]
    assert entry["variants"]["eager"]["error"] == entry["variants"]["eager-cudnn"]["error"] == 0
    assert entry["variants"]["eager-cudnn-graph"]["error"] < 1e-5 and 0 < entry["variants"]["ours"]["error"] < 1e-5
    for timed in entry["variants"].values():
        ms = timed["ms_per_step"]
        assert 0 < ms["low"] <= ms["median"] <= ms["high"]
    assert made["protocol"]["guidance"] == 4.0 and json.loads(out.read_text()) == made


def test_what_cannot_run_is_left_out_with_its_reason(shallow):
    (entry,) = run(variants=["eager", "ours-int8"])["entries"]
    assert list(entry["variants"]) == ["eager"]
    assert entry["left_out"]["ours-int8"].startswith("ValueError: the model is 192 wide; int8 wants a multiple of 128")


@pytest.mark.slow
def test_compiled_ways_end_there_too(shallow):
    (entry,) = run(variants=["eager", "compile-graph", "compile-tuned-graph"])["entries"]
    assert not entry["left_out"]
    assert all(entry["variants"][name]["error"] < 1e-5 for name in ("compile-graph", "compile-tuned-graph"))


@pytest.mark.parametrize("conditioning", ["both", "concat"])
def test_operations_of_a_step_are_those_of_its_products(conditioning: str):
    """But for the first and the last layer, which are less than a hundredth."""
    shape = Shape(size="Ti", tokens=64, images=1)
    dit = network(shape, conditioning, CPU)
    condition = Condition(tokens=torch.randn(2, 257, 1024), pooled=torch.randn(2, 768), latent=torch.randn(2, 4, 16, 16))
    with torch.inference_mode():
        context = dit.context(condition)
        modulation = dit.modulation(torch.zeros(2), context)
        with FlopCounterMode(display=False) as counter:
            dit.forward_prepared(torch.randn(2, 4, 16, 16), modulation, context)
    assert flops_of_step(dit, shape) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_way_that_there_is_not_is_named():
    with pytest.raises(ValueError, match=f"there is no variant fastest; there are {', '.join(VARIANTS)}"):
        run(variants=["fastest"])


def test_tokens_that_make_no_square_are_refused():
    with pytest.raises(ValueError, match="tokens is 17; wanted a square, such as 256 or 1024"):
        measure([Shape(size="Ti", tokens=17, images=1)], CPU, variants=["eager"], seconds=0.01, side=64)
