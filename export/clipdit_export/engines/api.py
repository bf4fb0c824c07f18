"""Which TensorRT is here: two packages with one API, each optional.

TensorRT-RTX builds for a GPU that is not there (its default); TensorRT builds only for the GPU of the machine. TensorRT-RTX has
no Hopper (SM90), TensorRT no builds ahead of time.
"""

import importlib
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

EngineTarget = Literal["tensorrt", "tensorrt-rtx"]

MODULES: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
EXTRAS: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}


def why_not(target: EngineTarget) -> str | None:
    """Why engines of this kind cannot be built here, in a line that ends in what to do; None when they can."""
    if find_spec(MODULES[target]) is None:
        return f'the Python package {MODULES[target]} is not installed. Run `pip install "clipdit[{EXTRAS[target]}]"`'
    if target == "tensorrt":
        import torch

        if not torch.cuda.is_available():
            return "TensorRT builds for the GPU of this machine, and there is none; take tensorrt-rtx, or export on that machine"
    return None


def load(target: EngineTarget) -> ModuleType:
    """The package. ValueError when it cannot be used here."""
    reason = why_not(target)
    if reason is not None:
        raise ValueError(f"{target} engines cannot be built here: {reason}")
    return importlib.import_module(MODULES[target])


def capabilities(target: EngineTarget, gpus: list[str]) -> list[str]:
    """ "sm89" ... -> the names of the API, "SM89". ValueError for one that this package has no engines for."""
    trt = load(target)
    known = sorted((n for n in dir(trt.ComputeCapability) if n.startswith("SM")), key=lambda name: int(name[2:]))
    for gpu in gpus:
        if gpu.upper() not in known:
            hint = "; Hopper runs TensorRT: --targets tensorrt, on such a machine" if gpu.lower() == "sm90" else ""
            raise ValueError(f"{target} builds no engine for {gpu}; it knows {', '.join(map(str.lower, known))}{hint}")
    return [gpu.upper() for gpu in gpus]


def inspect(target: EngineTarget, engine: bytes) -> str:
    """The inspector's account of an engine, JSON. ValueError when it cannot be opened here: that needs a GPU that it is for."""
    trt = load(target)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    opened = runtime.deserialize_cuda_engine(engine)
    if opened is None:
        raise ValueError(f"the {target} engine cannot be opened here; it wants a GPU that it was built for")
    return opened.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
