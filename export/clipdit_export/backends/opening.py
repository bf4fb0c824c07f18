"""Which backend opens a variant: the one table of runtimes."""

import torch

from clipdit_export.backends.base import BundleBackend, OnCall
from clipdit_export.backends.cuda import TensorRtBackend, TensorRtRtxBackend
from clipdit_export.backends.onnx import OnnxBackend
from clipdit_export.backends.openvino import OpenVinoBackend
from clipdit_export.bundle import Bundle

BACKENDS: dict[str, type[BundleBackend]] = {
    backend.target: backend for backend in (OnnxBackend, OpenVinoBackend, TensorRtBackend, TensorRtRtxBackend)
}
"""By the target of the variants that they open."""


def runs_here(target: str) -> bool:
    """Whether variants of a target can be opened on this machine."""
    return target in BACKENDS and BACKENDS[target].missing() is None


def open_variant(bundle: Bundle, variant: str, *, on_call: OnCall | None = None, in_parts: bool = False) -> BundleBackend:
    """Open a variant with the backend of its target; see `BundleBackend`."""
    backend = BACKENDS[bundle.manifest.variants[variant].target]
    return backend(bundle, variant, device=torch.device(backend.device_type), on_call=on_call, in_parts=in_parts)
