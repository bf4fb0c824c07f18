"""The backend "graphed": a checkpoint as eager runs it, with the whole sampling loop as one CUDA graph.

A graph holds all evaluations of the network, guidance and solver, for one shape, table and guidance. Its inputs are copied into
the memory that it was captured with: the latents, and the condition's context, which is computed outside. The graph is captured
at the second call of its kind, after the first has set up what kernels need.

The loop carries tokens, not latents: guidance and solver treat every number alike, so patches are cut before the first step and
put together after the last. The solver's constants are read from the device, so that no number of the table is inside the graph.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from clipdit.backend import Condition
from clipdit.model import ops
from clipdit.model.dit import DiT
from clipdit.model.network import Context
from clipdit.model.weights import read_json
from clipdit.pipeline import ClipDiTPipeline
from clipdit.sampling import SamplingTable
from clipdit.shapes import Latent
from clipdit.torch_backend import EagerBackend, Step, best_device, preferring

logger = logging.getLogger(__name__)

GRAPHS = 8
"""At most so many are kept; the one that was used longest ago goes first. Each holds the memory of a whole step."""
_CAPTURING = threading.Lock()


@dataclass(frozen=True)
class Captured:
    """A CUDA graph of a loop, and the memory it reads and writes."""

    replay: Callable[[], None]
    noise: Tensor
    context: Context
    result: Tensor


class GraphedBackend(EagerBackend):
    """Eager with the loop of each shape as one CUDA graph."""

    name = "graphed"
    preference = 0
    """Opened by name alone: it was measured on one kind of GPU. docs/kernels.md."""
    guided_step = staticmethod(ops.guided_step)

    def __init__(self, pipeline: ClipDiTPipeline, *, folder: Path | None = None):
        super().__init__(pipeline, folder=folder)
        self._captures = self.limits.device.type == "cuda"
        self._token_step: Step | None = preferring(
            self.attention_order(self.limits.device), self._build_token_step(pipeline.transformer)
        )
        self._graphs: OrderedDict[tuple, Captured | None] = OrderedDict()  # None: called once, not captured yet
        self._pairs: WeakKeyDictionary[Condition, Condition] = WeakKeyDictionary()
        self._tables: dict[SamplingTable, Tensor] = {}

    @classmethod
    def refusal(cls, device: torch.device) -> str | None:
        """Why this backend cannot run on a device, in a line that ends in what to do; None when it can."""
        return (
            None
            if device.type == "cuda"
            else f"CUDA graphs run on NVIDIA GPUs, not on {device.type}; use the eager backend there"
        )

    @classmethod
    def default_device(cls) -> torch.device:
        return best_device()

    @classmethod
    def why_not(cls, folder: Path) -> str | None:
        reason = cls.refusal(cls.default_device()) or super().why_not(folder)
        if reason is None and (kind := read_json(folder / "model_index.json").get("transformer", [None])[-1]) != DiT.__name__:
            return f"the {cls.name} backend runs a DiT, and {folder} holds a {kind}; use the eager backend"
        return reason

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
    ) -> "GraphedBackend":
        """See `EagerBackend.open`. ValueError for a device that it does not run on."""
        device = device or cls.default_device()
        if (reason := cls.refusal(device)) is not None:
            raise ValueError(reason)
        opened = super().open(folder, device=device, dtype=dtype, variant=variant)
        assert isinstance(opened, GraphedBackend)
        return opened

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
        dit, copies, (height, width) = self._pipeline.transformer, 1 if guidance == 1.0 else 2, noise.shape[-2:]
        rows, positions, step = self._rows(table), self._positions_of(height, width, noise.device), self._token_step
        assert step is not None
        x = ops.patchify(noise.float(), dit.config["patch"]).contiguous()
        memory, given = torch.zeros_like(x), x.to(dit.dtype).repeat(copies, 1, 1)
        modulations = self._modulations(rows[:, 0], len(given), context)
        for row, modulation in zip(rows, modulations, strict=True):
            f = step(given, modulation, context, positions)
            x, memory, given = self.guided_step(x, memory, f, row, guidance=guidance)
        return ops.unpatchify(x, dit.config["patch"], height, width).to(noise.dtype)

    def _build_token_step(self, dit: DiT) -> Step:
        return dit.forward_tokens

    def _rows(self, table: SamplingTable) -> Tensor:
        """The table on the device, uploaded once."""
        if table not in self._tables:
            self._tables[table] = table.tensor(self.limits.device)
        return self._tables[table]

    def _capture(self, noise: Latent, context: Context, table: SamplingTable, guidance: float) -> Captured:
        """Run the loop once more, recorded. Its inputs are copies, so that what a caller frees is not read again; and they are
        contiguous where views of a projection were not, for which torch.compile may compile anew: before the recording."""
        noise = noise.clone()
        context = _copied(context)
        self._loop(noise, context, table, guidance)
        replay, result = self._record(lambda: self._loop(noise, context, table, guidance))
        logger.info("captured %d evaluations of %s as one CUDA graph", len(table.rows), tuple(noise.shape))
        return Captured(replay=replay, noise=noise, context=context, result=result)

    def _record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(do it again, where its result lies)."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.limits.device)
        # a service has a thread for each model: PyTorch has one stream to capture on, and what another thread allocates meanwhile
        # is nothing to this graph
        with _CAPTURING, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result

    def close(self) -> None:
        self._graphs.clear()
        self._pairs.clear()
        self._tables.clear()
        self._token_step = None
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
