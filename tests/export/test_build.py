"""From a checkpoint to a bundle: whole or not at all, every graph checked, and the same model as before."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from clipdit.images import to_float
from clipdit.pipeline import load_checkpoint, save_checkpoint
from clipdit.testing import tiny_checkpoint, tiny_pipeline
from clipdit.translator import Translator
from clipdit_export.backends.onnx import OnnxBackend
from clipdit_export.build import build
from clipdit_export.bundle import open_bundle
from clipdit_export.manifest import REFERENCE
from clipdit_export.names import name_of
from clipdit_export.order import Order
from clipdit_export.parts import ImageEncoder, cut
from clipdit_export.sessions import call, open_session

SOURCES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def graphs(bundle: Path, variant: str = REFERENCE) -> dict[str, Path]:
    return {part: bundle / file for part, file in open_bundle(bundle).manifest.variants[variant].parts["32x32"].items()}


def test_every_part_is_a_graph_that_passes_the_checker_with_its_shapes_inferred(bundle: Path):
    for variant in open_bundle(bundle).manifest.variants:
        for part, path in graphs(bundle, variant).items():
            onnx.checker.check_model(str(path), full_check=True)
            inferred = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True)
            known = {value.name for value in (*inferred.graph.value_info, *inferred.graph.output)}
            assert all(output in known for node in inferred.graph.node for output in node.output if output), part


def check_every_part(folder: Path, checkpoint: Path, size: tuple[int, int], batch: int) -> None:
    """Each graph against the module that it was made of."""
    files = open_bundle(folder).manifest.variants[REFERENCE].parts[name_of(size)]
    for part in cut(load_checkpoint(checkpoint), size, batch=batch):
        with torch.inference_mode():
            wanted = part.module(*part.inputs.values())
        wanted = dict(zip(part.outputs, wanted if isinstance(wanted, tuple) else (wanted,), strict=True))
        got = call(open_session(folder / files[part.name]), {name: tensor.numpy() for name, tensor in part.inputs.items()})
        for name, tensor in wanted.items():
            if tensor.is_floating_point():
                difference = np.abs(got[name] - tensor.numpy()).max()
                assert difference <= 1e-4 * tensor.abs().max(), (part.name, name)
            else:
                assert np.abs(got[name].astype(int) - tensor.int().numpy()).max() <= 1, (part.name, name)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_every_part_answers_as_pytorch_does_at_any_batch(bundle: Path, checkpoint: Path, batch: int):
    check_every_part(bundle, checkpoint, (32, 32), batch)


@pytest.mark.parametrize("conditioning", ["both", *(pytest.param(name, marks=pytest.mark.slow) for name in ("clip", "concat"))])
def test_images_of_every_conditioning_are_those_of_the_checkpoint(conditioning: str, tmp_path: Path):
    folder = tmp_path / "checkpoint"
    save_checkpoint(tiny_pipeline(conditioning=conditioning), folder)
    build(folder, tmp_path / "bundle")
    images = [
        Translator.open(place, backend=backend)(SOURCES, seeds=[1, 2, 3], guidance=guidance)
        for place, backend in ((folder, "eager"), (tmp_path / "bundle", "onnx"))
        for guidance in (1.0, 2.0)
    ]
    for eager, onnx_ in ((images[0], images[2]), (images[1], images[3])):
        assert (eager.int() - onnx_.int()).abs().max() <= 1


def test_a_bundle_takes_no_guidance_where_its_model_takes_none(tmp_path: Path):
    pipeline = tiny_pipeline(conditioning="concat")
    pipeline.register_to_config(guidable=False)
    save_checkpoint(pipeline, tmp_path / "checkpoint")
    build(tmp_path / "checkpoint", tmp_path / "bundle")
    for place, backend in ((tmp_path / "checkpoint", "eager"), (tmp_path / "bundle", "onnx")):
        with pytest.raises(ValueError, match=r"guidance is 2\.0; this model was trained without, and takes 1"):
            Translator.open(place, backend=backend)(SOURCES, seeds=[1, 2, 3], guidance=2.0)


def test_inputs_and_outputs_are_named_as_in_the_protocol_and_only_the_batch_is_free(bundle: Path):
    step = onnx.load(graphs(bundle)["step"], load_external_data=False).graph
    assert [value.name for value in step.input][:3] == ["x", "blocks", "final"] and step.output[0].name == "velocity"
    for value in (*step.input, *step.output):
        batch, *others = value.type.tensor_type.shape.dim
        assert batch.dim_param == "batch" and all(dim.dim_value for dim in others)


def test_nodes_and_weights_have_names_that_a_person_can_read(bundle: Path):
    model = onnx.load(graphs(bundle)["step"], load_external_data=False)
    names = {node.name for node in model.graph.node}
    assert {"blocks.0.qkv/MatMul", "blocks.1.fc2/MatMul", "latent_in/MatMul", "latent_out/MatMul"} <= names
    assert not [name for name in names if re.search(r"node_|_\d{3}", name)]
    weights = {tensor.name for tensor in model.graph.initializer}
    assert {"blocks.0.qkv.weight", "blocks.0.qkv.bias", "latent_out.weight"} <= weights
    assert model.producer_name == "clipdit" and model.graph.doc_string
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert about["precision"] == "fp32" and about["size"] == "32x32" and len(about["checkpoint"]) == 64
    assert "site-packages" not in str(model) and str(Path.home()) not in str(model)


def test_weights_lie_in_one_file_once(bundle: Path):
    manifest = open_bundle(bundle).manifest
    graphs_alone = sum(file.bytes for name, file in manifest.files.items() if name.endswith(".onnx"))
    assert [name for name in manifest.files if name.endswith(".bin")] == ["graphs/weights.bin"]
    parameters = sum(p.numel() for p in load_checkpoint(bundle.with_name("checkpoint")).transformer.parameters())
    assert manifest.files["graphs/weights.bin"].bytes > parameters
    assert graphs_alone < 3_000_000


def test_every_variant_was_audited_and_measured_and_the_default_is_one_of_them(bundle: Path):
    manifest = open_bundle(bundle).manifest
    assert manifest.variants.keys() == {"onnx-fp32", "onnx-fp16", "onnx-int8"} and manifest.default in manifest.variants
    assert manifest.variants["onnx-fp16"].audit["step"].counts["fp16"] > 0
    assert manifest.variants["onnx-int8"].audit["step"].counts["int8"] > 0
    exact = manifest.variants[REFERENCE].quality
    assert exact is not None and exact.worst_drift == 0
    for name in ("onnx-fp16", "onnx-int8"):
        measured = manifest.variants[name].quality
        assert measured is not None and 0 < measured.worst_drift < 0.2 and len(measured.drift) == manifest.model.steps
        assert measured.psnr_db > 20
    assert all(variant.speed and variant.speed.per_image_ms > 0 for variant in manifest.variants.values())


@pytest.mark.slow
def test_several_sizes_share_a_bundle(checkpoint: Path, tmp_path: Path):
    build(checkpoint, tmp_path / "bundle", Order(sizes=((32, 32), (32, 48)), max_batch=4, images=1))
    for size in ((32, 32), (32, 48)):
        for batch in (1, 3, 4):
            check_every_part(tmp_path / "bundle", checkpoint, size, batch)
    with Translator(OnnxBackend.open(tmp_path / "bundle")) as translator:
        wide = torch.cat([SOURCES, SOURCES[..., :16]], dim=3)
        assert (
            translator(wide, seeds=[1, 2, 3]).shape == wide.shape and translator(SOURCES, seeds=[1, 2, 3]).shape == SOURCES.shape
        )
        (narrow,) = translator.translate_images([SOURCES[0, :, :, :20]], seeds=[1], size="nearest")  # into the square, by padding
        assert narrow.shape == (3, 32, 20) and translator.fit(wide[0], "nearest")[0].shape == (3, 32, 48)
        with pytest.raises(ValueError, match="image is 64 x 32; this backend takes 32 x 32, 48 x 32"):
            translator(torch.cat([SOURCES, SOURCES], dim=3), seeds=[1, 2, 3])


@pytest.mark.slow
def test_a_bundle_without_the_size_of_training_fits_images_to_one_that_it_has(checkpoint: Path, tmp_path: Path):
    build(checkpoint, tmp_path / "bundle", Order(sizes=((32, 48), (48, 32)), images=1))
    with Translator(OnnxBackend.open(tmp_path / "bundle")) as translator:
        assert translator.native_size == (32, 48)
        assert translator.translate_image(SOURCES[0], seed=1).shape == SOURCES[0].shape


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"sizes": ((30, 32),)}, "size 32 x 30 cannot be exported; both sides must be multiples of"),
        ({"calibration": Path("nowhere")}, "nowhere"),
    ],
)
def test_an_order_that_cannot_be_met_leaves_nothing_behind(change: dict, reason: str, checkpoint: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=reason):
        build(checkpoint, tmp_path / "bundle", Order(**change))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "limit, said",
    [
        pytest.param(300_000, "File too large: {out}", marks=pytest.mark.slow),
        (100_000, "has no room for a graph (problem writing element"),  # already where a graph is tried out
    ],
)
def test_a_disk_that_is_full_is_a_line_and_nothing_is_left(limit: int, said: str, checkpoint: Path, tmp_path: Path):
    code = f"""
import resource, sys
from clipdit.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(main(["export", "--model", {str(checkpoint)!r}, "--out", {str(tmp_path / "bundle")!r}]))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert said.format(out=tmp_path / "bundle") in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_readme_in_a_bundle_tells_a_stranger_what_it_is(bundle: Path):
    said = (bundle / "README.md").read_text()
    assert "# bundle" in said and "onnx-int8" in said and "clipdit translate IN OUT --model bundle" in said
    assert "README.md" in open_bundle(bundle).manifest.files


@pytest.mark.slow
def test_a_folder_that_is_no_bundle_is_left_alone_and_a_bundle_is_replaced(checkpoint: Path, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is there already, and is no bundle; give a new folder"):
        build(checkpoint, tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    build(checkpoint, tmp_path / "bundle")
    build(checkpoint, tmp_path / "bundle", Order(max_batch=2))
    assert open_bundle(tmp_path / "bundle").manifest.max_batch == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "mine"]


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no folder .*; give a checkpoint made by"):
        build(tmp_path / "none", tmp_path / "bundle")


def test_the_manifest_is_json_that_says_where_it_comes_from(bundle: Path):
    told = json.loads((bundle / "manifest.json").read_text())
    assert told["format"] == 1 and told["versions"]["torch"] and told["calibration"]


def test_another_checkpoint_has_another_fingerprint(bundle: Path, tmp_path: Path):
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    manifest = build(other, tmp_path / "bundle")
    assert manifest.model.checkpoint != open_bundle(bundle).manifest.model.checkpoint


@pytest.mark.parametrize("size", [(48, 32), (24, 40)])
def test_images_of_another_size_than_clip_takes_are_resized_as_clip_does_it(size: tuple[int, int]):
    clip = tiny_pipeline().clip
    assert clip is not None and size != (clip.side, clip.side)
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        for got, wanted in zip(ImageEncoder(clip, size)(images), clip(to_float(images)), strict=True):
            assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
