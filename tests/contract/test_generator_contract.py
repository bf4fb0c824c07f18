"""A generator in the seat of the DiT keeps the promises of a backend: one step, its own image for each source and seed, the same
pictures from the checkpoint and from every graph that is made of it."""

import pytest
import torch

from clipdit.backend import OneCall, available_backends, open_backend
from clipdit.direct import Direct
from clipdit.graphed_backend import GraphedBackend
from clipdit.model.generators import GlobalGenerator, UNet
from clipdit.model.pixels import Pixels
from clipdit.pipeline import ClipDiTPipeline, save_checkpoint
from clipdit.testing import TOLERANCES
from clipdit.translator import Translator
from clipdit_export.build import build
from clipdit_export.order import Order


@pytest.fixture(scope="module", params=["unet", "global"])
def checkpoint(request, tmp_path_factory):
    torch.manual_seed(0)
    network = (
        UNet(width=4, levels=5, patch=32) if request.param == "unet" else GlobalGenerator(width=4, downs=2, residuals=2, patch=4)
    )
    scheduler = Direct().to_scheduler()
    pipeline = ClipDiTPipeline(network.eval(), Pixels(), scheduler, image_size=(32, 32), default_steps=1, guidable=False)
    folder = tmp_path_factory.mktemp("generator") / "checkpoint"
    save_checkpoint(pipeline, folder)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint):
    out = checkpoint.with_name("bundle")
    build(checkpoint, out, Order(targets=("onnx", "openvino"), unroll=(1,)))
    return out


@pytest.fixture
def sources():
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_opened_as_any_checkpoint_it_makes_an_image_a_step(checkpoint, sources):
    with Translator.open(checkpoint, device="cpu") as translator:
        assert (translator.defaults.steps, translator.defaults.guidance) == (1, 1.0)
        made = translator(sources, seeds=[1, 2, 3])
        assert made.float().std() > 2, "a picture, not a plain ground"
        alone = torch.cat([translator(sources[i : i + 1], seeds=[1 + i]) for i in range(3)])
        assert (made.int() - alone.int()).abs().max() <= TOLERANCES[torch.float32].levels
        with pytest.raises(ValueError, match="makes its image in one"):
            translator(sources, seeds=[1, 2, 3], steps=2)
        with pytest.raises(ValueError, match=r"guidance is 2\.0; this model was trained without, and takes 1"):
            translator(sources, seeds=[1, 2, 3], guidance=2.0)


def test_diffusers_opens_it_too(checkpoint, sources):
    wanted = Translator.open(checkpoint, device="cpu")(sources, seeds=[1, 2, 3])
    assert torch.equal(ClipDiTPipeline.from_pretrained(checkpoint)(sources, seeds=[1, 2, 3]), wanted)
    read_by_diffusers = ClipDiTPipeline.from_pretrained(checkpoint, disable_mmap=True)
    assert torch.equal(read_by_diffusers(sources, seeds=[1, 2, 3]), wanted)


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_graphs_make_the_same_images_in_parts_and_as_a_whole(checkpoint, bundle, sources, name):
    if (reason := available_backends(bundle)[name]) is not None:
        pytest.skip(reason)
    wanted = Translator.open(checkpoint, device="cpu")(sources, seeds=[1, 2, 3])
    backend = open_backend(bundle, name)
    translator, levels = Translator(backend), TOLERANCES[backend.limits.dtype].levels
    assert isinstance(backend, OneCall) and backend.is_one_call((32, 32), backend.table(1), 1.0)
    whole = translator(sources, seeds=[1, 2, 3])
    parts = translator(sources, seeds=[1, 2, 3], on_step=lambda row, x: None)  # who wants to see the steps gets the parts
    backend.close()
    assert (whole.int() - wanted.int()).abs().max() <= levels and (parts.int() - wanted.int()).abs().max() <= levels


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_it_makes_the_same_images(checkpoint, sources):
    if (reason := available_backends(checkpoint)["compiled"]) is not None:
        pytest.skip(reason)
    eager, compiled = (Translator.open(checkpoint, backend=name, device="cpu") for name in ("eager", "compiled"))
    difference = compiled(sources, seeds=[1, 2, 3]).int() - eager(sources, seeds=[1, 2, 3]).int()
    assert difference.abs().max() <= TOLERANCES[torch.float32].levels


def test_backends_of_a_dit_alone_say_what_they_found(checkpoint, monkeypatch):
    monkeypatch.setattr(GraphedBackend, "refusal", classmethod(lambda cls, device: None))  # as on a GPU
    assert "the graphed backend runs a DiT, and" in (GraphedBackend.why_not(checkpoint) or "")
