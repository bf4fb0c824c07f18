"""A translation as one graph: pixels and noise in, pixels out, and every recipe holds in it as it does in the parts."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from clipdit.pipeline import save_checkpoint
from clipdit.sampling import seeded_noise
from clipdit.testing import tiny_pipeline
from clipdit.translator import Translator
from clipdit_export.audit import audit_graph
from clipdit_export.backends.onnx import OnnxBackend
from clipdit_export.build import build
from clipdit_export.bundle import open_bundle
from clipdit_export.graphs import trace
from clipdit_export.order import Order
from clipdit_export.parts import Part
from clipdit_export.precision.quantize import candidates
from clipdit_export.precision.recipe import Recipe, default_recipe
from clipdit_export.sessions import call, open_session, run_model

SOURCES = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
KEPT = Recipe(name="kept", quantize="int8", parts=("step",), keep=("step:blocks.0.qkv/*",))
PART = "whole_euler2_1.5"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A bundle with two steps at guidance 1.5 as one graph."""
    folder = tmp_path_factory.mktemp("whole")
    pipeline = tiny_pipeline()
    pipeline.register_to_config(default_guidance=1.5, default_steps=2)
    save_checkpoint(pipeline, folder / "checkpoint")
    recipes = (*map(default_recipe, ("fp32", "fp16", "int8")), KEPT)
    build(folder / "checkpoint", folder / "bundle", Order(recipes=recipes, unroll=(2,), max_batch=4))
    return folder / "bundle"


def graph(bundle: Path, variant: str, part: str = PART) -> Path:
    return bundle / open_bundle(bundle).manifest.variants[variant].parts["32x32"][part]


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_it_alone_makes_the_images_of_the_checkpoint(whole: Path, batch: int):
    noise, sources = seeded_noise(range(batch), (4, 8, 8)), SOURCES[:batch]
    got = call(open_session(graph(whole, "onnx-fp32")), {"noise": noise.numpy(), "source_u8": sources.numpy()})
    wanted = Translator.open(whole.with_name("checkpoint"), backend="eager")(sources, seeds=range(batch))
    assert got["finite"].all()
    assert (torch.from_numpy(got["image_u8"]).int() - wanted.int()).abs().max() <= 1


def test_the_translator_takes_it_where_it_fits_and_the_parts_elsewhere(whole: Path):
    calls: Counter[str] = Counter()
    backend = OnnxBackend(open_bundle(whole), "onnx-fp32", on_call=lambda part, _: calls.update([part]))
    with Translator(backend) as translator:
        one = translator(SOURCES, seeds=range(4))
        assert calls == {PART: 1}
        seen: list[int] = []
        parts = translator(SOURCES, seeds=range(4), on_step=lambda i, _: seen.append(i))  # who watches the steps gets steps
        assert seen == [0, 1] and calls["step"] == 4 and (one.int() - parts.int()).abs().max() <= 1
        translator(SOURCES, seeds=range(4), steps=3)
        assert calls[PART] == 1


@pytest.mark.parametrize("variant, kind", [("onnx-fp16", "fp16"), ("onnx-int8", "int8"), ("onnx-kept", "int8")])
def test_a_recipe_does_in_every_step_what_it_does_in_the_step_alone(whole: Path, variant: str, kind: str):
    def counted(part: str) -> Counter[str]:
        return Counter(audit_graph(ir.load(graph(whole, variant, part)), kind).counts)

    others = [p for p in ("image_encoder", "vae_encoder", "vae_decoder", "conditioner", "modulation") if kind == "int8"]
    assert counted(PART)[kind] == 2 * counted("step")[kind] + sum(counted(part)[kind] for part in others) or kind == "fp16"
    assert counted(PART)[kind] >= 2 * counted("step")[kind] > 0


def test_a_node_that_a_recipe_keeps_is_kept_in_every_step(whole: Path):
    nodes = {node.name: node for node in onnx.load(graph(whole, "onnx-kept"), load_external_data=False).graph.node}
    kept = [name for name in nodes if name.endswith(":blocks.0.qkv/MatMul")]
    assert kept == ["step.1:blocks.0.qkv/MatMul", "step.2:blocks.0.qkv/MatMul"]
    unpacked = {output for node in nodes.values() if node.op_type == "DequantizeLinear" for output in node.output}
    assert not any(set(nodes[name].input) & unpacked for name in kept)
    assert set(nodes["step.2:blocks.1.qkv/MatMul"].input) <= unpacked


class Twice(nn.Module):
    """A layer of a real network's size in two steps; the optimiser treats small ones otherwise."""

    def __init__(self):
        super().__init__()
        self.dit = nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.dit(self.dit(x).relu())


def test_a_weight_of_real_size_is_a_constant_that_can_be_quantised_in_every_step():
    part = Part(name="step", module=Twice(), inputs={"x": torch.randn(2, 4, 128)}, outputs=("y",))
    model = trace(part)
    assert len(candidates(model)) == 2 and "Transpose" not in {node.op_type for node in model.graph}
    wanted = part.module(part.inputs["x"]).detach().numpy()
    np.testing.assert_allclose(run_model(model, [{"x": part.inputs["x"].numpy()}])[0]["y"], wanted, atol=1e-5)


def test_quantised_it_stays_as_near_as_the_quantised_parts(whole: Path):
    exact = Translator.open(whole, backend="onnx:onnx-fp32")(SOURCES, seeds=range(4))
    with Translator.open(whole, backend="onnx:onnx-int8") as translator:
        one = translator(SOURCES, seeds=range(4))
        parts = translator(SOURCES, seeds=range(4), on_step=lambda *_: None)
    errors = [float((images.float() - exact.float()).square().mean()) for images in (one, parts)]
    assert 0 < errors[0] <= 1.5 * errors[1]
