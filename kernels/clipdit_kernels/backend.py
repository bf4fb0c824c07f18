"""The backend "triton": a checkpoint whose steps run on fused kernels, and on a GPU the whole loop as one CUDA graph.

A graph holds all evaluations of the network, guidance and solver, for one shape, table and guidance. Its inputs are copied into
the memory that it was captured with: the latents, and the condition's context, which is computed outside. The graph is captured
at the second call of its kind, after the first has compiled the kernels.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from clipdit.backend import Condition
from clipdit.model.dit import Context
from clipdit.pipeline import ClipDiTPipeline
from clipdit.sampling import SamplingTable
from clipdit.shapes import Latent
from clipdit.torch_backend import EagerBackend, best_device
from clipdit_kernels import fused
from clipdit_kernels.launch import interpreted, why_not_here
from clipdit_kernels.quantized import FUSED_INT8, quantize

logger = logging.getLogger(__name__)

GRAPHS = 8
"""At most so many are kept; the one that was used longest ago goes first. Each holds the memory of a whole step."""


@dataclass(frozen=True)
class Captured:
    """A CUDA graph of a loop, and the memory it reads and writes."""

    replay: Callable[[], None]
    noise: Tensor
    context: Context
    result: Tensor


INT8 = "int8"
"""The variant whose products are of 8-bit integers; see clipdit_kernels.quantized."""


class TritonBackend(EagerBackend):
    """Eager, with fused kernels in the DiT and the loop of each shape as one CUDA graph."""

    name = "triton"
    preference = 0
    """Opened by name alone, as long as no GPU has measured it: docs/kernels.md."""

    def __init__(self, pipeline: ClipDiTPipeline, *, folder: Path | None = None, int8: bool = False):
        """`int8` changes the pipeline's DiT for good. ValueError for a model that it does not take."""
        super().__init__(pipeline, folder=folder)
        ops, self.left_plain = fused.fused_for(pipeline.transformer)
        for name, reason in self.left_plain.items():
            logger.info("%s stays plain: %s", name, reason)
        if int8:
            quantize(pipeline.transformer, ops, FUSED_INT8)
        else:
            pipeline.transformer.use(ops)
        self._captures = self.limits.device.type == "cuda"
        self._graphs: OrderedDict[tuple, Captured | None] = OrderedDict()  # None: called once, not captured yet
        self._pairs: WeakKeyDictionary[Condition, Condition] = WeakKeyDictionary()
        self._tables: dict[SamplingTable, Tensor] = {}

    @classmethod
    def why_not(cls, folder: Path) -> str | None:
        return why_not_here(torch.device("cpu") if interpreted() else best_device()) or super().why_not(folder)

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
        device = device or (torch.device("cpu") if interpreted() else best_device())
        if (reason := why_not_here(device)) is not None:
            raise ValueError(reason)
        int8 = variant == INT8
        opened = super().open(folder, device=device, dtype=dtype, variant=None if int8 else variant)
        assert isinstance(opened, TritonBackend)
        return cls(opened._pipeline, folder=folder, int8=True) if int8 else opened

    def sample(self, noise: Latent, condition: Condition, table: SamplingTable, *, guidance: float = 1.0) -> Latent:
        """See `clipdit.backend.WholeLoop`."""
        self._check(noise, noise.new_empty(len(noise)), condition)
        context = self._context(self._guided(condition) if guidance != 1.0 else condition)
        if not self._captures:
            return self._loop(noise, context, table, guidance)
        key = (tuple(noise.shape), table, guidance)
        captured = self._graphs.get(key)
        if key not in self._graphs:
            self._graphs[key] = None
            while len(self._graphs) > GRAPHS:
                self._graphs.popitem(last=False)
            return self._loop(noise, context, table, guidance)
        self._graphs.move_to_end(key)
        if captured is None:
            captured = self._graphs[key] = self._capture(noise, context, table, guidance)
        captured.noise.copy_(noise)
        for kept, given in zip(_tensors(captured.context), _tensors(context), strict=True):
            kept.copy_(given)
        captured.replay()
        return captured.result.clone()  # the next replay writes over it

    def _guided(self, condition: Condition) -> Condition:
        """The condition, then the one that says nothing, as one of twice the batch; kept with the condition."""
        both = self._pairs.get(condition)
        if both is None:
            null = condition.null()
            both = self._pairs[condition] = Condition(
                **{name: torch.cat([tensor, getattr(null, name)]) for name, tensor in vars(condition).items()}
            )
        return both

    def _loop(self, noise: Latent, context: Context, table: SamplingTable, guidance: float) -> Latent:
        """All rows of the table; the network answers `copies` times the batch."""
        dit, copies = self._pipeline.transformer, 1 if guidance == 1.0 else 2
        rows = self._rows(table)
        times, x, memory = rows[:, 0], noise.float(), torch.zeros_like(noise, dtype=torch.float32)
        given = x.to(dit.dtype).repeat(copies, 1, 1, 1)
        modulations = self._modulations(times, len(given), context)
        for row, modulation in zip(rows, modulations, strict=True):
            f = self._advance(given, modulation, context)
            x, memory, given = fused.guided_step(x, memory, f.contiguous(), row, guidance=guidance)
        return x.to(noise.dtype)

    def _rows(self, table: SamplingTable) -> Tensor:
        """The table on the device, uploaded once."""
        if table not in self._tables:
            self._tables[table] = table.tensor(self.limits.device)
        return self._tables[table]

    def _capture(self, noise: Latent, context: Context, table: SamplingTable, guidance: float) -> Captured:
        """Run the loop once more, recorded. Its inputs are copies, so that what a caller frees is not read again."""
        noise = noise.clone()
        context = _copied(context)
        replay, result = self._record(lambda: self._loop(noise, context, table, guidance))
        logger.info("captured %d evaluations of %s as one CUDA graph", len(table.rows), tuple(noise.shape))
        return Captured(replay=replay, noise=noise, context=context, result=result)

    def _record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(do it again, where its result lies)."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.limits.device)
        with torch.cuda.graph(graph):
            result = run()
        return graph.replay, result

    def close(self) -> None:
        self._graphs.clear()
        self._pairs.clear()
        self._tables.clear()
        super().close()


def _tensors(context: Context) -> list[Tensor]:
    """All that a context holds, in one order."""
    pairs = [tensor for pair in context.keys_values if pair is not None for tensor in pair]
    return [tensor for tensor in (context.source_tokens, context.pooled) if tensor is not None] + pairs


def _copied(context: Context) -> Context:
    return Context(
        source_tokens=None if context.source_tokens is None else context.source_tokens.clone(),
        pooled=None if context.pooled is None else context.pooled.clone(),
        keys_values=tuple(None if pair is None else (pair[0].clone(), pair[1].clone()) for pair in context.keys_values),
    )
