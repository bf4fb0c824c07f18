"""ONNX Runtime, opened and called in one way everywhere."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    import onnx_ir as ir  # needed to build bundles, not to run them

Feed = Mapping[str, np.ndarray]
"""A call of a graph: its inputs by name."""


def open_session(path: Path, *, threads: int | None = None, providers: list[Any] | None = None) -> Any:
    """An InferenceSession on the CPU, or on `providers`. `threads` None are as many as PyTorch uses.

    ValueError, one line, for a graph that is damaged, or that this ONNX Runtime cannot run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    # a session's threads wait for its next call by spinning: they would take the cores from the next session
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers or ["CPUExecutionProvider"])
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):  # its errors have no base of their own
            raise
        raise ValueError(f"{path.name}: ONNX Runtime cannot run it here: {_words(error)}") from error


def _words(error: Exception) -> str:
    """Without "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : "."""
    return str(error).splitlines()[0].rpartition(" : ")[2]


def call(session: Any, feed: Feed) -> dict[str, np.ndarray]:
    """Outputs by name; inputs that the graph does not read are left out."""
    names = [output.name for output in session.get_outputs()]
    read = {i.name: feed[i.name] for i in session.get_inputs()}
    return dict(zip(names, session.run(names, read), strict=True))


def open_model(model: "ir.Model", folder: Path, *, name: str = "model") -> Any:
    """A session of a graph that lies in no file; `folder` holds its weights, and must stay while the session is used.

    OSError that says what to do where there is no room for them."""
    import onnx_ir as ir

    try:
        ir.save(model, folder / f"{name}.onnx", external_data=f"{name}.weights")
    except OSError as error:
        said = error.strerror or error  # numpy's own have no number
        raise OSError(f"{folder.parent} has no room for a graph ({said}); make room, or name another folder as TMPDIR") from error
    return open_session(folder / f"{name}.onnx")


def run_model(model: "ir.Model", feeds: Iterable[Feed]) -> list[dict[str, np.ndarray]]:
    """The outputs of a graph that lies in no file, for each of `feeds`."""
    with TemporaryDirectory() as folder:
        session = open_model(model, Path(folder))
        return [call(session, feed) for feed in feeds]
