"""The runtimes of NVIDIA GPUs: TensorRT, TensorRT-RTX, and ONNX Runtime's CUDA provider.

Tensors stay on the GPU from the first part to the last: PyTorch owns the memory, the runtimes are given addresses.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch

from clipdit.files import cache_home, write_atomically
from clipdit_export.backends.base import BundleBackend, Graph, Tensors
from clipdit_export.engines.api import EXTRAS, MODULES, EngineTarget, capability_here, load, logger_of
from clipdit_export.manifest import Variant, file_entry
from clipdit_export.sessions import open_session

NO_GPU = "{} runs on NVIDIA GPUs, and PyTorch finds none here; `clipdit doctor` says what is missing"


def _to_torch(trt: Any, dtype: Any) -> torch.dtype:
    known = {
        trt.float32: torch.float32,
        trt.float16: torch.float16,
        trt.bfloat16: torch.bfloat16,
        trt.int64: torch.int64,
        trt.int32: torch.int32,
        trt.uint8: torch.uint8,
        trt.bool: torch.bool,
    }
    return known[dtype]


class EngineGraph:
    """An engine as a function of tensors on its GPU, on PyTorch's current stream."""

    def __init__(self, trt: Any, path: Path, device: torch.device, *, cache: Path | None = None, weights_of: Path | None = None):
        """`cache`: where TensorRT-RTX keeps its kernels. `weights_of`: the graph that a stripped engine takes its weights from.

        ValueError, one line, for an engine that cannot be opened here, or a graph that does not fit it."""
        self._trt, self._device, self._cache, told = trt, device, cache, logger_of(trt)
        with torch.cuda.device(device):
            self._runtime = trt.Runtime(told)  # kept: the engine lives in it
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if self._engine is None:
                reason = told.last or "it gave no reason"
                raise ValueError(f"{path.name}: {trt.__name__} {trt.__version__} cannot open it here: {reason}; export again")
            if weights_of is not None:
                self._fill(weights_of, told)
            self._runtime_cache = None
            self._context = self._engine.create_execution_context() if cache is None else self._cached_context(cache)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self._read = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        self._made = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        self._dtypes = {name: _to_torch(trt, self._engine.get_tensor_dtype(name)) for name in names}

    def _fill(self, graph: Path, told: Any) -> None:
        refitter = self._trt.Refitter(self._engine, told)
        taken = self._trt.OnnxParserRefitter(refitter, told).refit_from_file(str(graph)) and refitter.refit_cuda_engine()
        if not taken:
            missing = ", ".join(refitter.get_missing_weights()[:3])
            reason = f"{missing} ... are missing" if missing else told.last or "it gave no reason"
            raise ValueError(f"{graph.name}: its weights do not fit the stripped engine: {reason}; export again")

    def __call__(self, given: Tensors) -> Tensors:
        inputs = {name: given[name].to(self._device, self._dtypes[name]).contiguous() for name in self._read}
        for name, tensor in inputs.items():
            self._context.set_input_shape(name, tuple(tensor.shape))
            self._context.set_tensor_address(name, tensor.data_ptr())
        outputs = {}
        for name in self._made:
            shape = tuple(self._context.get_tensor_shape(name))
            outputs[name] = torch.empty(shape, dtype=self._dtypes[name], device=self._device)
            self._context.set_tensor_address(name, outputs[name].data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise RuntimeError(f"{self._trt.__name__} could not run its engine; its log says why")
        self._keep_cache()
        return outputs

    def _cached_context(self, cache: Path) -> Any:
        """TensorRT-RTX compiles kernels for this GPU at the first call. What it made before is taken up; a cache of another GPU
        or version is refused by TensorRT-RTX itself, and made anew."""
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._runtime_cache = config.create_runtime_cache()
        if cache.exists():
            self._runtime_cache.deserialize(cache.read_bytes())
        config.set_runtime_cache(self._runtime_cache)
        return self._engine.create_execution_context(config)

    def _keep_cache(self) -> None:
        """After the first call, when the kernels are there."""
        if self._runtime_cache is not None and self._cache is not None:
            write_atomically(self._cache, bytes(self._runtime_cache.serialize()))
            self._runtime_cache = None


class EngineBackend(BundleBackend):
    """Runs the engines of a bundle."""

    target: ClassVar[EngineTarget]
    device_type = "cuda"

    @classmethod
    def missing(cls) -> str | None:
        if find_spec(MODULES[cls.target]) is None:
            return f'the Python package {MODULES[cls.target]} is not installed. Run `pip install "clipdit[{EXTRAS[cls.target]}]"`'
        return None if torch.cuda.is_available() else NO_GPU.format(cls.name)

    @classmethod
    def unfit(cls, variant: Variant) -> str | None:
        here = capability_here()
        if variant.gpus and here not in variant.gpus:
            return f"its engines are for {', '.join(variant.gpus)}, and this GPU is {here}; export with --gpus {here}"
        return None

    def _load(self, path: Path, variant: Variant) -> Graph:
        weights = self._weights_of(path, variant)
        return EngineGraph(load(self.target), path, self.limits.device, cache=self._cache_of(path), weights_of=weights)

    def _cache_of(self, path: Path) -> Path | None:
        return None

    def _weights_of(self, path: Path, variant: Variant) -> Path | None:
        """The graph that an engine was built from, where the engine holds no weights."""
        if "stripped" not in variant.engine:
            return None
        graphs = self._bundle.manifest.variants[f"onnx-{variant.precision}"].parts
        at = [(size, part) for size, parts in variant.parts.items() for part, file in parts.items() if path.match(file)]
        size, part = at[0]
        return self._bundle.checked(graphs[size][part])


class TensorRtBackend(EngineBackend):
    """TensorRT."""

    name = "tensorrt"
    target = "tensorrt"
    preference = 40


class TensorRtRtxBackend(EngineBackend):
    """TensorRT-RTX, with its cache of compiled kernels and its own CUDA graphs."""

    name = "tensorrt-rtx"
    target = "tensorrt-rtx"
    preference = 35

    def _cache_of(self, path: Path) -> Path:
        gpu = torch.cuda.get_device_name(self.limits.device).replace(" ", "-")
        return cache_home() / "tensorrt-rtx" / f"{file_entry(path).sha256[:32]}.{gpu}"


class OnnxCudaBackend(BundleBackend):
    """The graphs of a bundle with ONNX Runtime on a GPU, a CUDA graph for each batch size."""

    name = "onnx-cuda"
    target = "onnx"
    preference = 15
    device_type = "cuda"

    @classmethod
    def missing(cls) -> str | None:
        if find_spec("onnxruntime") is None:
            return "ONNX Runtime is not installed. Run `pip install onnxruntime-gpu`"
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "this ONNX Runtime has no CUDA. Run `pip uninstall onnxruntime` and `pip install onnxruntime-gpu`"
        return None if torch.cuda.is_available() else NO_GPU.format(cls.name)

    def _load(self, path: Path, variant: Variant) -> Graph:
        options = {"device_id": self.limits.device.index or 0, "enable_cuda_graph": "1"}
        return BoundSession(open_session(path, providers=[("CUDAExecutionProvider", options)]), self.limits.device)


class BoundSession:
    """A session whose inputs and outputs have fixed addresses for each batch size, as a CUDA graph needs them."""

    def __init__(self, session: Any, device: torch.device):
        self._session, self._device = session, device
        self._bound: dict[int, tuple[Tensors, Tensors, Any, Any]] = {}

    def __call__(self, given: Tensors) -> Tensors:
        names = [value.name for value in self._session.get_inputs()]
        batch = len(given[names[0]])
        if batch not in self._bound:
            self._bound[batch] = self._bind(batch)
        inputs, outputs, binding, options = self._bound[batch]
        for name, tensor in inputs.items():
            tensor.copy_(given[name])
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # the session has a stream of its own
        self._session.run_with_iobinding(binding, options)
        return {name: tensor.clone() for name, tensor in outputs.items()}

    def _bind(self, batch: int) -> tuple[Tensors, Tensors, Any, Any]:
        import onnxruntime

        binding, options = self._session.io_binding(), onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(batch))
        buffers: tuple[Tensors, Tensors] = ({}, {})
        sides = (self._session.get_inputs(), binding.bind_input), (self._session.get_outputs(), binding.bind_output)
        for kept, (values, bind) in zip(buffers, sides, strict=True):
            for value in values:
                dtype = TORCH_TYPES[value.type]
                kept[value.name] = torch.zeros((batch, *value.shape[1:]), dtype=dtype, device=self._device)
                at = {"device_type": self._device.type, "device_id": self._device.index or 0}
                address, shape = kept[value.name].data_ptr(), tuple(kept[value.name].shape)
                bind(value.name, **at, element_type=NUMPY_TYPES[dtype], shape=shape, buffer_ptr=address)
        return (*buffers, binding, options)


TORCH_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(uint8)": torch.uint8,
    "tensor(int64)": torch.int64,
    "tensor(bool)": torch.bool,
}
NUMPY_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.uint8: "uint8", torch.int64: "int64", torch.bool: "bool"}
