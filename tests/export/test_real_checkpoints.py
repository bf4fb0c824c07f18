"""The promises of an export on networks of the size that users have; minutes each."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clipdit.backend import builtin_checkpoint
from clipdit.demo import read_samples
from clipdit.images import fit
from clipdit.pipeline import load_checkpoint
from clipdit.presets import paper_edges2shoes
from clipdit.testing import full_size_checkpoint
from clipdit.translator import Translator
from clipdit_export.build import build
from clipdit_export.bundle import open_bundle
from clipdit_export.manifest import REFERENCE
from clipdit_export.names import name_of
from clipdit_export.order import Order
from clipdit_export.parts import cut
from clipdit_export.sessions import call, open_session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def worst_error(bundle: Path, checkpoint: Path, size: tuple[int, int], batch: int, unroll: tuple[int, ...] = ()) -> float:
    """Of all parts' floats, relative to the largest of each; images may be a level off."""
    files = open_bundle(bundle).manifest.variants[REFERENCE].parts[name_of(size)]
    worst = 0.0
    for part in cut(load_checkpoint(checkpoint), size, batch=batch, unroll=unroll):
        with torch.inference_mode():
            wanted = part.module(*part.inputs.values())
        got = call(open_session(bundle / files[part.name]), {name: tensor.numpy() for name, tensor in part.inputs.items()})
        for name, tensor in zip(part.outputs, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            difference = np.abs(got[name].astype(np.float32) - tensor.float().numpy()).max()
            if tensor.is_floating_point():
                worst = max(worst, float(difference / tensor.abs().max()))
            else:
                assert difference <= 1, (part.name, name)
    return worst


def test_the_built_in_checkpoint_is_the_same_model_in_every_size_at_any_batch(tmp_path: Path):
    sizes = ((128, 128), (128, 160))
    build(builtin_checkpoint(), tmp_path / "bundle", Order(sizes=sizes, unroll=(2,), images=1))
    for size in sizes:
        for batch in (1, 3, 16):
            assert worst_error(tmp_path / "bundle", builtin_checkpoint(), size, batch, unroll=(2,)) <= 1e-4
    samples = read_samples(builtin_checkpoint().parent / "samples").source
    sources = torch.stack([fit(image, sizes[0])[0] for image in samples[:4]])
    eager = Translator.open(backend="eager")(sources, seeds=range(4))
    onnx = Translator.open(tmp_path / "bundle", backend=f"onnx:{REFERENCE}")(sources, seeds=range(4))
    assert (eager.int() - onnx.int()).abs().max() <= 1


def test_the_papers_model_in_full_size_is_exported_as_it_is(tmp_path: Path):
    paper = replace(paper_edges2shoes(), steps=2)  # DiT-B/2, CLIP ViT-L/14, 256 px; of its 50 steps none is another graph
    checkpoint = full_size_checkpoint(tmp_path / "checkpoint", paper)
    manifest = build(checkpoint, tmp_path / "bundle", Order(images=1, max_batch=1))
    assert manifest.model.conditioning == "clip" and manifest.model.native_size == (256, 256)
    assert worst_error(tmp_path / "bundle", checkpoint, (256, 256), 1) <= 1e-4
