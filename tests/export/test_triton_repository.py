"""What a Triton Inference Server is given: a description that fits the bundle, and a model that answers as the translator does.

The model runs here as Triton would run it, with a stand-in for the module that Triton gives it; the server itself is in
test_triton_server.py."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from clipdit.cli import main
from clipdit.translator import Translator
from clipdit_export.triton_repository import write_repository


class Tensor:
    def __init__(self, name: str, array: np.ndarray):
        self.name, self.array = name, array

    def __dlpack__(self, **words):
        return self.array.__dlpack__(**words)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    @staticmethod
    def from_dlpack(name: str, tensor: torch.Tensor) -> "Tensor":
        return Tensor(name, np.from_dlpack(tensor))


class Error:
    INVALID_ARG = 3

    def __init__(self, message: str, code: int):
        self.message, self.code = message, code


@pytest.fixture
def repository(bundle: Path, tmp_path: Path) -> Path:
    write_repository(bundle, tmp_path / "models", name="emoji", backend="onnx:onnx-fp32")
    return tmp_path / "models"


@pytest.fixture
def model(repository: Path, monkeypatch):
    """The model, initialised as Triton does it."""
    triton = ModuleType("triton_python_backend_utils")
    triton.Tensor, triton.TritonError = Tensor, Error  # pyright: ignore[reportAttributeAccessIssue]  (a module made here)
    triton.InferenceResponse = lambda output_tensors, error=None: SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]  (a module made here)
        tensors=output_tensors, error=error
    )
    triton.get_input_tensor_by_name = lambda request, name: request[name]  # pyright: ignore[reportAttributeAccessIssue]  (a module made here)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    spec = importlib.util.spec_from_file_location("triton_model", repository / "emoji" / "1" / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.TritonPythonModel()
    settings = re.search(r'key: "backend" value: \{ string_value: "([^"]*)"', (repository / "emoji" / "config.pbtxt").read_text())
    assert settings is not None
    config = {"parameters": {"backend": {"string_value": settings[1]}}}
    made.initialize({"model_config": json.dumps(config), "model_repository": str(repository / "emoji"), "model_version": "1"})
    yield made
    made.finalize()


def request(count: int, first_seed: int, size: tuple[int, int] = (32, 32)) -> dict[str, Tensor]:
    images = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(first_seed))
    seeds = np.arange(first_seed, first_seed + count, dtype=np.int64)[:, None]
    return {"source_u8": Tensor("source_u8", images.numpy()), "seed": Tensor("seed", seeds)}


def test_requests_that_come_together_are_answered_each_with_its_own_images(model, bundle: Path):
    requests = [request(count, seed) for count, seed in ((1, 10), (2, 20), (3, 30), (1, 40))]  # 4 at once is the bundle's limit
    translator = Translator.open(bundle, backend="onnx:onnx-fp32")
    for given, answer in zip(requests, model.execute(requests), strict=True):
        assert answer.error is None
        sources, seeds = torch.from_numpy(given["source_u8"].array), given["seed"].array.reshape(-1)
        wanted = torch.cat([translator(one[None], seeds=[int(s)]) for one, s in zip(sources, seeds, strict=True)])
        (image,) = answer.tensors
        assert image.name == "image_u8" and np.abs(image.array.astype(int) - wanted.numpy().astype(int)).max() <= 1


def test_a_request_that_cannot_be_served_gets_an_error_and_the_others_their_images(model):
    good, wide = model.execute([request(1, 1), request(1, 2, size=(32, 64))])
    assert good.error is None and "this backend takes 32 x 32" in wide.error.message and not wide.tensors


def test_a_seed_that_cannot_be_spoils_no_other_request(model):
    good, bad, other = model.execute([request(1, 1), request(1, -2), request(1, 3)])
    assert bad.error.message == "seed is -2; wanted an integer from 0 to 2**63 - 1" and bad.error.code == Error.INVALID_ARG
    for answer, alone in ((good, request(1, 1)), (other, request(1, 3))):
        (wanted,) = model.execute([alone])
        assert answer.error is None and np.abs(answer.tensors[0].array.astype(int) - wanted.tensors[0].array).max() <= 1


def test_the_description_fits_the_bundle(repository: Path):
    said = (repository / "emoji" / "config.pbtxt").read_text()
    assert 'name: "emoji"' in said and 'backend: "python"' in said and "max_batch_size: 4" in said
    assert said.count("dims: [ 3, 32, 32 ]") == 3 and "KIND_CPU" in said
    assert said.count("{") == said.count("}") and said.count("[") == said.count("]")


def test_the_metadata_say_the_same_as_the_description(repository: Path):
    told = json.loads((repository / "emoji" / "metadata.json").read_text())
    said = (repository / "emoji" / "config.pbtxt").read_text()
    assert told["name"] == "emoji" and told["platform"] == "python"
    for tensor in (*told["inputs"], *told["outputs"]):
        dims = ", ".join(map(str, tensor["shape"][1:]))
        assert f'{{ name: "{tensor["name"]}" data_type: TYPE_{tensor["datatype"]} dims: [ {dims} ] }}' in said


def test_a_model_that_is_there_is_left_alone(repository: Path, bundle: Path):
    with pytest.raises(ValueError, match="emoji is there already; give another name or repository"):
        write_repository(bundle, repository, name="emoji")
    assert sorted(path.name for path in repository.iterdir()) == ["emoji"]


def test_export_writes_the_repository(checkpoint: Path, tmp_path: Path):
    words = ["--model", str(checkpoint), "--out", str(tmp_path / "b"), "--images", "1", "--triton", str(tmp_path / "models")]
    assert main(["export", *words]) == 0
    assert (tmp_path / "models" / "b" / "1" / "bundle" / "manifest.json").exists()
