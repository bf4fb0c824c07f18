"""The backend "triton": a checkpoint whose steps run on fused kernels, and on a GPU the whole loop as one CUDA graph."""

import logging
from pathlib import Path

import torch

from clipdit.graphed_backend import GraphedBackend
from clipdit.pipeline import ClipDiTPipeline
from clipdit.torch_backend import best_device
from clipdit_kernels import fp8, fused
from clipdit_kernels.launch import interpreted, why_not_here
from clipdit_kernels.quantized import VARIANTS as IN_8_BITS
from clipdit_kernels.quantized import LowOps, quantize

logger = logging.getLogger(__name__)


class TritonBackend(GraphedBackend):
    """Eager, with fused kernels in the DiT and the loop of each shape as one CUDA graph."""

    name = "triton"
    guided_step = staticmethod(fused.guided_step)

    def __init__(self, pipeline: ClipDiTPipeline, *, folder: Path | None = None, low: LowOps | None = None):
        """`low` is how to multiply numbers of 8 bits; it changes the pipeline's DiT for good. ValueError for a model that it does
        not take, or a GPU that does not multiply them."""
        ops, self.left_plain = fused.fused_for(pipeline.transformer)
        for name, reason in self.left_plain.items():
            logger.info("%s stays plain: %s", name, reason)
        if low is not None:
            dit = pipeline.transformer
            if low.name == "fp8" and (reason := fp8.why_not_on(dit.device, dit.dtype)) is not None:
                raise ValueError(reason)
            quantize(dit, ops, low)
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
        return [*super().variants(folder), *IN_8_BITS]

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
    ) -> "TritonBackend":
        """See `EagerBackend.open`; `variant` "int8" or "fp8" computes what is not in 8 bits in `dtype`. ValueError for a device
        that kernels do not run on, or a model that has no such variant."""
        low = IN_8_BITS.get(variant or "")
        opened = super().open(folder, device=device, dtype=dtype, variant=variant if low is None else None)
        assert isinstance(opened, TritonBackend)
        return opened if low is None else cls(opened._pipeline, folder=folder, low=low)
