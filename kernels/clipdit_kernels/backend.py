"""The backend "triton": a checkpoint whose steps run on fused kernels, and on a GPU the whole loop as one CUDA graph."""

import logging
from pathlib import Path

import torch

from clipdit.graphed_backend import GraphedBackend
from clipdit.pipeline import ClipDiTPipeline
from clipdit.torch_backend import best_device
from clipdit_kernels import fused
from clipdit_kernels.launch import interpreted, why_not_here
from clipdit_kernels.quantized import FUSED_INT8, quantize

logger = logging.getLogger(__name__)

INT8 = "int8"
"""The variant whose products are of 8-bit integers; see clipdit_kernels.quantized."""


class TritonBackend(GraphedBackend):
    """Eager, with fused kernels in the DiT and the loop of each shape as one CUDA graph."""

    name = "triton"
    guided_step = staticmethod(fused.guided_step)

    def __init__(self, pipeline: ClipDiTPipeline, *, folder: Path | None = None, int8: bool = False):
        """`int8` changes the pipeline's DiT for good. ValueError for a model that it does not take."""
        ops, self.left_plain = fused.fused_for(pipeline.transformer)
        for name, reason in self.left_plain.items():
            logger.info("%s stays plain: %s", name, reason)
        if int8:
            quantize(pipeline.transformer, ops, FUSED_INT8)
        else:
            pipeline.transformer.use(ops)
        super().__init__(pipeline, folder=folder)

    @classmethod
    def refusal(cls, device: torch.device) -> str | None:
        return why_not_here(device)

    @classmethod
    def default_device(cls) -> torch.device:
        return torch.device("cpu") if interpreted() else best_device()

    @classmethod
    def variants(cls, folder: Path) -> list[str]:
        return [*super().variants(folder), INT8]

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
    ) -> "TritonBackend":
        """See `EagerBackend.open`; `variant` "int8" computes what is not in 8 bits in `dtype`. ValueError for a device that
        kernels do not run on, or a model that has no int8."""
        int8 = variant == INT8
        opened = super().open(folder, device=device, dtype=dtype, variant=None if int8 else variant)
        assert isinstance(opened, TritonBackend)
        return cls(opened._pipeline, folder=folder, int8=True) if int8 else opened
