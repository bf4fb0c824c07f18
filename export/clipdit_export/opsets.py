"""Attention spelled out in five nodes (opset 20) or as one (opset 23): both are traced, and the faster one is exported.

Which it is depends on model, runtime and version, so it is measured, with ONNX Runtime on the CPU.
Only the step is asked: it runs at every time of the loop. VAEs stay at 20: their
attention has heads that are too wide for the fused kernels of TensorRT (NVIDIA/TensorRT#4705).
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir
import torch

from clipdit.measuring import time_calls_ms
from clipdit_export.graphs import OPSETS, trace
from clipdit_export.parts import Part
from clipdit_export.precision.search import relative_error
from clipdit_export.sessions import call, open_model

logger = logging.getLogger(__name__)

LEAST_GAIN = 1.03
"""Of one node over five: below it the form is taken that every runtime knows."""
AGREEMENT = 1e-4
"""Relative error between the two, at most."""


def faster(part: Part, *, seconds: float = 2.0) -> tuple[ir.Model, dict[int, float]]:
    """The graph of a part in the opset that ONNX Runtime runs faster here; and by opset, the median of a call in milliseconds.

    Where the two do not agree, or one cannot be run, it is the spelled-out one, and the log says why."""
    models = {opset: trace(part, opset=opset) for opset in OPSETS}
    spelled, fused = OPSETS
    feed = {name: tensor.numpy() for name, tensor in part.inputs.items()}
    with TemporaryDirectory() as folder:
        try:
            sessions = {opset: open_model(m, Path(folder), name=str(opset)) for opset, m in models.items()}
        except ValueError as error:
            logger.warning("attention stays spelled out: %s", error)
            return models[spelled], {}
        answers = {opset: call(session, feed) for opset, session in sessions.items()}
        calls = [lambda s=session: call(s, feed) for session in sessions.values()]
        times = dict(zip(OPSETS, (s.median for s in time_calls_ms(calls, torch.device("cpu"), seconds=seconds)), strict=True))
    error = relative_error([answers[fused]], [answers[spelled]])
    if error > AGREEMENT:
        logger.warning("attention stays spelled out: as one node it is %.1e away (relative), wanted %g", error, AGREEMENT)
        return models[spelled], times
    return models[choose(times)], times


def choose(times: Mapping[int, float]) -> int:
    """The opset to export, from the milliseconds of a call by opset."""
    spelled, fused = OPSETS
    return fused if times[spelled] / times[fused] >= LEAST_GAIN else spelled
