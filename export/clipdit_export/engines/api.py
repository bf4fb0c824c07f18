"""Which TensorRT is here: two packages with one API, each optional.

TensorRT-RTX builds for a GPU that is not there (its default); TensorRT builds only for the GPU of the machine. TensorRT-RTX has
no Hopper (SM90), TensorRT no builds ahead of time.
"""

import importlib
import logging
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

logger = logging.getLogger(__name__)

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


def capability_here() -> str:
    """Of this machine's first GPU, as "sm90"."""
    import torch

    return f"sm{''.join(map(str, torch.cuda.get_device_capability()))}"


def inspect(target: EngineTarget, engine: bytes) -> str:
    """The inspector's account of an engine, JSON. ValueError when it cannot be opened here: that needs a GPU that it is for."""
    trt = load(target)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    opened = runtime.deserialize_cuda_engine(engine)
    if opened is None:
        raise ValueError(f"the {target} engine cannot be opened here; it wants a GPU that it was built for")
    return opened.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)


def logger_of(trt: ModuleType) -> Any:
    """A logger of the package's own class that tells Python's, and keeps the last error as `last`."""

    class Told(trt.ILogger):
        """Into Python's logging; the last error is what a failed build is explained by."""

        def __init__(self):
            super().__init__()
            self.last = ""

        def log(self, severity, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last = message
            logger.debug("%s", message)

    return Told()
