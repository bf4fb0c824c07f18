"""The fused operations as operators of torch.library: schemas, fakes and gradients hold, and compilers pass through them."""

import inspect
from collections.abc import Callable
from dataclasses import fields

import jaxtyping
import pytest
import torch
from guarded import DEVICE, FINEST
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clipdit.backend import Condition
from clipdit.model import ops as plain
from clipdit.model.dit import Context, DiT, Modulation
from clipdit.model.ops import PLAIN
from clipdit_kernels import attention, fused, mlp, norm, solver
from clipdit_kernels.fused import FUSED, TRAINING

NEAR = {"rtol": 1e-4, "atol": 1e-4} if torch.float32 == FINEST else {"rtol": 2e-2, "atol": 2e-2}
"""Of a small model; on a GPU its products are of half precision."""


def randn(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_(grad)


def factor(*shape: int) -> Tensor:
    """Of a product."""
    return randn(*shape, dtype=FINEST)


def rows(grad: bool = False) -> list[Tensor]:
    return [randn(2, 1, 32, grad=grad) for _ in range(3)]


CALLS: dict[str, tuple[Callable, tuple]] = {
    "norm_modulate": (norm.alone, (randn(2, 4, 32, grad=True), *rows(grad=True)[:2], "layer", 1e-6)),
    "norm alone": (norm.alone, (randn(2, 4, 32, grad=True), None, None, "rms", 1e-6)),
    "gate_residual_norm_modulate": (
        norm.both,
        (randn(2, 4, 32, grad=True), randn(2, 4, 32, grad=True), *rows(grad=True), "layer", 1e-6),
    ),
    "residual and norm": (norm.both, (randn(2, 4, 32, grad=True), randn(2, 4, 32, grad=True), None, None, None, "rms", 1e-6)),
    "attention": (attention.cross, (factor(2, 4, 32), factor(2, 5, 32), factor(2, 5, 32), 2)),
    "qkv_attention": (attention.packed, (factor(2, 4, 96), 2, factor(16), factor(16), randn(4, 16), randn(4, 16))),
    "linear_gelu": (mlp.linear_gelu, (factor(2, 4, 32), factor(64, 32), factor(64))),
    "linear_swiglu": (mlp.linear_swiglu, (factor(2, 4, 32), factor(64, 32), factor(64))),
    "guided_step": (solver.step, (randn(2, 4, 4, 4), randn(2, 4, 4, 4), randn(4, 4, 4, 4), randn(6), 3.0)),
}


@pytest.mark.parametrize("name", CALLS)
def test_schema_fake_and_gradient_registration_hold(name: str):
    operator, arguments = CALLS[name]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("name", CALLS)
def test_a_fake_on_a_gpu_has_the_shapes_types_and_strides_of_the_real_thing(name: str):
    operator, arguments = CALLS[name]
    with torch.no_grad():
        real = operator(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = [
            torch.empty(a.shape, dtype=a.dtype, device="cuda") if isinstance(a, Tensor) else a
            for a in arguments
        ]  # fmt: skip
        made = operator(*there)
    for fake, tensor in zip(*((x if isinstance(x, tuple) else (x,)) for x in (made, real)), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
        assert fake.device.type == "cuda"


def model(dtype: torch.dtype = FINEST, **changes) -> tuple[DiT, tuple[Tensor, Tensor, Condition]]:
    torch.manual_seed(0)
    dit = DiT(latent_channels=4, width=32, depth=2, heads=2, clip_token_width=12, clip_embedding_width=10, **changes)
    for parameter in dit.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    condition = Condition(tokens=randn(2, 5, 12), pooled=randn(2, 10), latent=randn(2, 4, 4, 4)).map(lambda x: x.to(dtype))
    return dit.to(DEVICE, dtype).eval(), (randn(2, 4, 4, 4, dtype=dtype), torch.tensor([0.3, 0.8], device=DEVICE), condition)


@pytest.fixture
def unchecked_types():
    """torch.compile cannot trace the checks of shapes that tests put around every call."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@torch.inference_mode()
def test_a_step_compiles_through_them_in_one_graph(mlp: str, unchecked_types):
    dit, (x, t, condition) = model(mlp=mlp)
    context = dit.context(condition)
    given = (x, dit.modulation(t, context), context)
    wanted = dit.forward_prepared(*given)
    dit.use(FUSED)
    compiled = torch.compile(dit.forward_prepared, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), wanted, **NEAR)


@torch.no_grad()
def test_a_model_is_exported_through_them():
    dit, (x, t, condition) = model()
    context = dit.context(condition)
    modulation = dit.modulation(t, context)
    wanted = dit.forward_prepared(x, modulation, context)
    dit.use(FUSED)

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dit = dit

        def forward(self, x, blocks, final, tokens, pairs):
            pairs = tuple((pairs[2 * i], pairs[2 * i + 1]) for i in range(len(pairs) // 2))
            context = Context(source_tokens=tokens, pooled=None, keys_values=pairs)
            return self.dit.forward_prepared(x, Modulation(blocks=blocks, final=final), context)

    pairs = [tensor for pair in context.keys_values for tensor in pair]
    given = (x, modulation.blocks, modulation.final, context.source_tokens, pairs)
    program = torch.export.export(Step(), given)
    called = {str(node.target) for node in program.graph.nodes if "clipdit" in str(node.target)}
    assert called == {f"clipdit.{name}.default" for name in (
        "norm_modulate", "gate_residual_norm_modulate", "linear_gelu", "attention", "qkv_attention",
    )}  # fmt: skip
    torch.testing.assert_close(program.module()(*given), wanted, **NEAR)


def test_a_model_trains_through_those_that_have_gradients():
    dit, given = model(torch.float32)

    def gradients() -> dict[str, Tensor]:
        dit.zero_grad()
        dit(*given).square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in dit.named_parameters()}

    wanted = gradients()
    dit.use(TRAINING)
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-5)


def test_every_twin_has_the_signature_of_the_plain_operation():
    twins = [field for field in fields(FUSED) if getattr(FUSED, field.name) is not getattr(PLAIN, field.name)]
    assert len(twins) == 6
    for field in twins:
        one, other = (inspect.signature(getattr(module, field.name)) for module in (fused, plain))
        assert list(one.parameters) == list(other.parameters)
        for a, b in zip(one.parameters.values(), other.parameters.values(), strict=True):
            assert (a.kind, a.default) == (b.kind, b.default), field.name
