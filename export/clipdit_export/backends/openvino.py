"""OpenVINO on the CPU: the same ONNX graphs, computed in what the variant says.

OpenVINO takes bfloat16 by itself where the CPU has it; so a variant always says which type it was measured with.
"""

import functools
from collections import Counter, OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from clipdit_export.backends.base import BundleBackend, Graph, Tensors
from clipdit_export.manifest import Audit, Variant

HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
BATCHES_KEPT = 4
"""Compiled for so many batch sizes: a graph of one fixed shape runs faster than one that takes any, and compiles in a second."""
PRODUCTS = frozenset({"FullyConnected", "MatMul", "Convolution", "ScaledDotProductAttention", "MHA"})
TYPES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8"}


@functools.cache
def core() -> Any:
    """OpenVINO's Core of this process: one, and to the end.

    Its CPU plugin gives the thread that opens it a signal stack of its own, and unmaps it with itself (`SigAltStackSetup` in
    openvino's intel_cpu/src/plugin.cpp). Where two were open and the first one was closed first, the thread is left with a stack
    that is unmapped, and its next signal (Ctrl-C) ends the process by SIGSEGV, without a word.
    """
    import openvino

    return openvino.Core()


class OpenVinoBackend(BundleBackend):
    """Runs the graphs of a bundle with OpenVINO's CPU plugin."""

    name = "openvino"
    target = "openvino"
    preference = 20

    @classmethod
    def missing(cls) -> str | None:
        return None if find_spec("openvino") else 'OpenVINO is not installed. Run `pip install "clipdit[openvino]"`'

    def _load(self, path: Path, variant: Variant) -> Graph:
        return _Graph(path, variant.recipe.compute)

    def audit(self, size: str, part: str) -> Audit:
        """By the plugin's own account of the graph that it compiled for one image."""
        graph, recipe = self.graph(size, part), self._bundle.manifest.variants[self.variant].recipe
        assert isinstance(graph, _Graph)
        counts: Counter[str] = Counter()
        for node in graph.compiled(1)[0].get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            if str(info["layerType"].astype(str)) in PRODUCTS:
                said = str(info["runtimePrecision"].astype(str))
                counts[TYPES.get(said, said)] += 1
        return Audit(wanted=recipe.quantize or recipe.compute, counts=dict(sorted(counts.items())), read_from="engine")


class _Graph:
    """A graph, compiled for each batch size that it is called with."""

    def __init__(self, path: Path, compute: str):
        self._model = core().read_model(str(path))
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": HINTS[compute],
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
            "ENABLE_CPU_PINNING": "NO",  # pinned to cores, several processes on a machine would share the first ones
        }
        self._by_batch: OrderedDict[int, tuple[Any, Any]] = OrderedDict()
        self._read = [value.any_name for value in self._model.inputs]
        self._made = [value.any_name for value in self._model.outputs]

    def __call__(self, given: Tensors) -> Tensors:
        _, request = self.compiled(len(given[self._read[0]]))
        request.infer({name: given[name].contiguous().numpy() for name in self._read}, share_inputs=True)
        # copies: the request writes into the same memory at its next call
        return {name: torch.from_numpy(request.get_tensor(name).data.copy()) for name in self._made}

    def compiled(self, batch: int) -> tuple[Any, Any]:
        """The compiled model and a request of it."""
        if batch not in self._by_batch:
            model = self._model.clone()
            sides = {value.any_name: list(value.partial_shape)[1:] for value in model.inputs}
            shapes = {name: [batch, *(side.get_length() for side in rest)] for name, rest in sides.items()}
            model.reshape(shapes)
            compiled = core().compile_model(model, "CPU", self._settings)
            self._by_batch[batch] = compiled, compiled.create_infer_request()
            if len(self._by_batch) > BATCHES_KEPT:
                self._by_batch.popitem(last=False)
        self._by_batch.move_to_end(batch)
        return self._by_batch[batch]
