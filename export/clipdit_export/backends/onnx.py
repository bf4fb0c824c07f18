"""ONNX Runtime on the CPU."""

from importlib.util import find_spec
from pathlib import Path

import torch

from clipdit_export.backends.base import BundleBackend, Graph, Tensors
from clipdit_export.manifest import Variant
from clipdit_export.sessions import call, open_session


class OnnxBackend(BundleBackend):
    """Runs the graphs of a bundle on any CPU."""

    name = "onnx"
    target = "onnx"
    preference = 5

    @classmethod
    def missing(cls) -> str | None:
        return None if find_spec("onnxruntime") else 'ONNX Runtime is not installed. Run `pip install "clipdit[onnx]"`'

    def _load(self, path: Path, variant: Variant) -> Graph:
        session = open_session(path)

        def run(given: Tensors) -> Tensors:
            feed = {name: tensor.contiguous().numpy() for name, tensor in given.items()}
            return {name: torch.from_numpy(array) for name, array in call(session, feed).items()}

        return run
