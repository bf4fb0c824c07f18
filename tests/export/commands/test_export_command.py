"""`clipdit export`, `inspect` and `doctor` as a user types them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from clipdit.cli import main
from clipdit.translator import Translator


def test_export_writes_a_bundle_and_says_what_is_in_it(checkpoint: Path, tmp_path: Path, capsys):
    assert main(["export", "--model", str(checkpoint), "--out", str(tmp_path / "b"), "--precision", "fp32,int8"]) == 0
    said = capsys.readouterr().out
    assert "onnx-fp32" in said and "onnx-int8" in said and "opened by default: onnx-" in said
    assert main(["inspect", str(tmp_path / "b"), "--verify"]) == 0
    assert "files are as they were exported" in capsys.readouterr().out


@pytest.mark.slow
def test_a_bundle_in_one_file_opens_like_its_folder(checkpoint: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["export", "--model", str(checkpoint), "--out", str(tmp_path / "b"), "--images", "1", "--zip"]) == 0
    source = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    folder, archive = (Translator.open(tmp_path / name, backend="onnx")(source, seeds=[1]) for name in ("b", "b.zip"))
    assert torch.equal(folder, archive)


def test_export_as_json_is_the_manifest(checkpoint: Path, tmp_path: Path, capsys):
    assert main(["export", "--model", str(checkpoint), "--out", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "b" / "manifest.json").read_text())


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--precision", "fp23"], "precision is 'fp23'; wanted one of fp32, fp16, bf16"),
        (["--targets", "coreml"], "--targets has coreml; wanted some of onnx, openvino, tensorrt, tensorrt-rtx"),
        (["--targets", "tensorrt-rtx"], "name them, as --gpus sm89,sm120"),
        (["--engine", "fast"], "--engine has fast; wanted some of refittable, stripped, hardware-compatible, version-compatible"),
        (["--sizes", "large"], '--sizes has "large"; wanted a side in pixels such as 256'),
        (["--max-batch", "0"], "max_batch is 0; wanted at least 1"),
        (["--recipe", "none.json"], "there is no recipe none.json"),
        (["--calibration", "."], ". holds no images; wanted side-by-side images"),
    ],
)
def test_input_that_is_wrong_is_one_line_and_leaves_nothing(
    words: list[str], reason: str, checkpoint: Path, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--model", str(checkpoint), "--out", "b", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert reason in said[-1] and not list(tmp_path.iterdir())


def test_a_flipped_byte_is_a_failed_check(bundle: Path, tmp_path: Path, capsys):
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    weights = copy / "graphs" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert main(["inspect", str(copy)]) == 0
    assert main(["inspect", str(copy), "--verify"]) == 4
    assert "graphs/weights.bin is not the file that was exported" in capsys.readouterr().out


def test_inspect_of_a_checkpoint_tells_its_parts(checkpoint: Path, capsys):
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["native_size"] == [32, 32] and told["parameters"]["transformer"] > 1000
    assert main(["inspect", str(checkpoint)]) == 0
    assert "32 x 32 px" in capsys.readouterr().out


def test_inspect_of_neither_is_refused(tmp_path: Path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "model_index.json" in capsys.readouterr().err


def test_doctor_says_of_everything_whether_it_works_or_what_to_do(capsys):
    assert main(["doctor"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("ok ", "no "))]
    assert any("CPU" in line for line in lines) and any("eager" in line for line in lines)
    assert all(len(line.split()) > 2 for line in lines)
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["backends"]["eager"] is None and told["provenance"]["hardware"]["cpu"]
