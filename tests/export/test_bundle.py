"""Nothing is opened that is not what was exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from clipdit.backend import available_backends, open_backend
from clipdit_export.bundle import open_bundle

SOURCE = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.mark.parametrize("file", ["graphs/weights.bin", "graphs/32x32.fp32.vae_encoder.onnx"])
@pytest.mark.parametrize("where", [0, -1, 0.5])
def test_a_flipped_byte_is_refused(file: str, where: float, copy: Path):
    path = copy / file
    data = bytearray(path.read_bytes())
    data[where if isinstance(where, int) else int(where * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is not the file that was exported \(its hash differs\); export again"):
        open_backend(copy, "onnx:onnx-fp32").encode(SOURCE)


def test_a_truncated_file_a_missing_one_and_one_that_is_not_listed_are_refused(copy: Path):
    path = copy / "graphs" / "32x32.fp32.vae_encoder.onnx"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"not the file that was exported \(\d+ bytes, wanted \d+\)"):
        open_backend(copy, "onnx:onnx-fp32").encode(SOURCE)
    path.unlink()
    with pytest.raises(ValueError, match=r"is not whole: graphs/32x32\.fp32\.vae_encoder\.onnx is missing"):
        open_backend(copy, "onnx:onnx-fp32").encode(SOURCE)
    with pytest.raises(ValueError, match="is not listed"):
        open_bundle(copy).checked("graphs/other.onnx")


def test_another_models_weights_are_refused(copy: Path, bundle: Path):
    other = copy / "graphs" / "weights.bin"
    other.write_bytes(bytes(len(other.read_bytes())))
    with pytest.raises(ValueError, match="its hash differs"):
        open_backend(copy, "onnx:onnx-fp32").encode(SOURCE)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda told: told.pop("model"), "model: Field required"),
        (lambda told: told.update(format=99), "format 99; this clipdit reads format 1"),
        (lambda told: told.update(max_batch=0), "max_batch: Input should be greater than or equal to 1"),
        (lambda told: told.update(extra=1), "extra: Extra inputs are not permitted"),
    ],
)
def test_a_manifest_that_is_damaged_is_refused_in_a_line(change, reason: str, copy: Path):
    told = json.loads((copy / "manifest.json").read_text())
    change(told)
    (copy / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=reason) as caught:
        open_backend(copy, "onnx:onnx-fp32")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_bundle_says_what_was_wanted(tmp_path: Path):
    assert "wanted a folder made by `clipdit export`" in (available_backends(tmp_path)["onnx"] or "")


def test_a_variant_is_opened_by_its_name_and_one_that_is_not_there_is_refused(copy: Path):
    from clipdit_export.backends.onnx import OnnxBackend

    assert OnnxBackend.open(copy, variant="onnx-int8").variant == "onnx-int8"
    assert OnnxBackend.open(copy, dtype=torch.float16).variant == "onnx-fp16"
    with pytest.raises(ValueError, match="no variant onnx-int7 for the onnx backend; there are onnx-"):
        OnnxBackend.open(copy, variant="onnx-int7")
