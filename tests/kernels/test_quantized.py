"""A DiT in 8 bits: the same model, a little off, and by no more than the plain definition is."""

import copy

import pytest
import torch
from guarded import DEVICE, FINEST

from clipdit.backend import Condition
from clipdit.model.dit import DiT
from clipdit.model.ops import PLAIN
from clipdit_kernels.fused import FUSED
from clipdit_kernels.quantized import FUSED_FP8, FUSED_INT8, PLAIN_FP8, PLAIN_INT8, LowOps, QuantizedLinear, quantize


def model(dtype: torch.dtype = FINEST, **changes) -> DiT:
    torch.manual_seed(0)
    options = {"width": 128, "depth": 2, "heads": 2, "clip_token_width": 24, "clip_embedding_width": 16} | changes
    dit = DiT(latent_channels=4, **options)
    for parameter in dit.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return dit.to(DEVICE, dtype).eval()


def given(dtype: torch.dtype = FINEST) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"tokens": (2, 5, 24), "pooled": (2, 16), "latent": (2, 4, 4, 4)}
    condition = Condition(**{name: torch.randn(shape, generator=generator).to(DEVICE, dtype) for name, shape in shapes.items()})
    x = torch.randn(2, 4, 4, 4, generator=generator).to(DEVICE, dtype)
    return x, torch.tensor([0.2, 0.7], device=DEVICE), condition


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@torch.inference_mode()
@pytest.mark.parametrize("low, twin, allowed", [(PLAIN_INT8, FUSED_INT8, 0.03), (PLAIN_FP8, FUSED_FP8, 0.06)])
def test_it_is_the_same_model_a_little_off_and_fused_as_plain(low: LowOps, twin: LowOps, allowed: float):
    dtype = torch.bfloat16 if DEVICE.type == "cuda" and low.name == "fp8" else FINEST  # all that products of it come in there
    dit = model(dtype)
    wanted, exact = dit(*given(dtype)), model(torch.float32)(*given(torch.float32))
    plain, fused = copy.deepcopy(dit), copy.deepcopy(dit)
    quantize(plain, PLAIN, low)
    quantize(fused, FUSED, twin)
    one, other = plain(*given(dtype)), fused(*given(dtype))
    assert 1e-4 < relative(one, wanted) < allowed
    # a number on the edge between two steps may fall to either side, and what follows with it; and of two ways to compute in
    # bfloat16 (on the CPU: float32) each rounds elsewhere
    assert relative(other, one) < 0.5 * relative(one, wanted) + relative(wanted, exact)
    assert relative(other, exact) < 1.25 * relative(one, exact)


@torch.inference_mode()
def test_what_multiplies_in_8_bits_is_what_the_docs_say():
    dit = model()
    quantize(dit, PLAIN, PLAIN_INT8)
    layers = {name for name, module in dit.named_modules() if isinstance(module, QuantizedLinear)}
    assert layers == {f"blocks.{i}.{name}" for i in range(2) for name in ("qkv", "fc1", "fc2", "cross.q")}
    assert isinstance(dit.latent_out, torch.nn.Linear) and isinstance(dit.blocks[0].out, torch.nn.Linear)
    assert dit.blocks[0].qkv.numbers.dtype == torch.int8
    dit = model()
    quantize(dit, PLAIN, PLAIN_FP8)
    assert {name for name, module in dit.named_modules() if isinstance(module, QuantizedLinear)} == layers
    assert dit.blocks[0].qkv.numbers.dtype == torch.float8_e4m3fn


def test_a_model_with_a_gate_is_refused():
    with pytest.raises(ValueError, match=r"its MLP is swiglu; int8 has kernels for gelu alone\. Use bf16"):
        quantize(model(mlp="swiglu"), PLAIN, PLAIN_INT8)


@pytest.mark.parametrize("changes, said", [({"width": 96}, "the model is 96 wide"), ({"mlp_ratio": 1.5}, "its MLP is 192 wide")])
def test_a_model_of_an_uneven_width_is_refused(changes: dict, said: str):
    dit = model(**changes)
    with pytest.raises(ValueError, match=f"{said}; int8 wants a multiple of 128, which share a scale. Use bf16"):
        quantize(dit, PLAIN, PLAIN_INT8)
    assert not any(isinstance(module, QuantizedLinear) for module in dit.modules())
