"""Where a teacher ends from each noise: what its few-step student learns to reach on a straight line.

Reflow (Liu et al. 2023, "Flow straight and fast", sec. 2.2; Liu et al. 2024, "InstaFlow", for conditional models): draw noise,
let the frozen teacher carry it to its end, guided as it is in use, and train on the straight line between the two as flow
matching does on that between noise and target. Each noise has one end, so lines hardly cross, and the student's first velocity
already points at the end: one evaluation where the teacher needs twenty, and guidance twice as many.

Ends cost the teacher's whole loop. So they are found in blocks as training goes on, each is learnt from several times, and they
lie beside the run: a resumed one finds them again.
"""

import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clipdit.backend import WholeLoop
from clipdit.data.cache import LatentCache, condition_of, fingerprint
from clipdit.model.network import Network
from clipdit.sampling import SamplingTable
from clipdit.shapes import Latent
from clipdit.train.order import batch_indices, rank_slice, step_generator
from clipdit.train.processes import from_main, on_main, processes
from clipdit.train.state import save_tensors

logger = logging.getLogger(__name__)
OF_ENDS = 1
"""The randomness of a block is not that of the training step of its number."""


@dataclass(frozen=True, kw_only=True)
class EndsSettings:
    """How many ends the teacher is asked for."""

    reuse: int = 16
    """How often an end is learnt from, on average. Finding one takes the teacher as many evaluations as it has steps, twice as
    many with guidance; learning from it costs about three."""
    ahead: int = 4
    """Batches of ends before the first step."""
    keep: int = 4096
    """The latest so many ends are learnt from."""
    steps: int | None = None
    """Sampling steps of the teacher; its default if not given."""

    def __post_init__(self) -> None:
        for name in ("reuse", "ahead", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"ends.{name} is {getattr(self, name)}; wanted at least 1")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"ends.steps is {self.steps}; wanted at least 1")


class Block(NamedTuple):
    """As many ends as a batch has images."""

    rows: Int[np.ndarray, "B"]
    """Of the cache."""
    noise: Latent
    end: Latent


class Ends:
    """The ends of a teacher from the sources of a cache. A pure function of the seed and the teacher, kept below `folder`.

    Args:
        teacher: whose `sample` says where noise ends; on the device of this process.
        dit: its network, which says what it reads of a cached row.
        guidance: with which it is followed; the student needs none then.
        batch: images of a training step, over all processes; they share the work.
    """

    def __init__(
        self,
        teacher: WholeLoop,
        dit: Network,
        table: SamplingTable,
        *,
        guidance: float,
        cache: LatentCache,
        folder: Path,
        batch: int,
        seed: int,
        settings: EndsSettings,
    ):
        self.teacher, self.dit, self.table, self.guidance = teacher, dit, table, guidance
        self.cache, self.batch, self.seed, self.settings = cache, batch, seed, settings
        key = [fingerprint(dit), cache.folder.name, asdict(cache.statistics), table.rows, guidance, batch, seed]
        self.folder = folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        self._blocks: dict[int, Block] = {}

    def draw(self, step: int, generator: torch.Generator) -> Block:
        """A batch of the latest ends known at this step; finds new ones where that is due. All processes must call it alike."""
        known = self.settings.ahead + step // self.settings.reuse
        first = max(0, known - math.ceil(self.settings.keep / self.batch))
        for number in [number for number in self._blocks if number < first]:
            del self._blocks[number]
            if processes().is_main_process:
                self._file(number).unlink(missing_ok=True)
        for number in range(first, known):
            if number not in self._blocks:
                self._blocks[number] = self._block(number)
        which = torch.randint((known - first) * self.batch, (self.batch,), generator=generator).tolist()
        chosen = [(self._blocks[first + place // self.batch], place % self.batch) for place in which]
        return Block(
            rows=np.array([block.rows[i] for block, i in chosen]),
            noise=torch.stack([block.noise[i] for block, i in chosen]),
            end=torch.stack([block.end[i] for block, i in chosen]),
        )

    def _file(self, number: int) -> Path:
        return self.folder / f"block-{number:06d}.safetensors"

    def _block(self, number: int) -> Block:
        generator = step_generator(self.seed, number, OF_ENDS)
        pairs = batch_indices(self.cache.pairs, self.batch, number, self.seed)
        rows = pairs * self.cache.views + torch.randint(self.cache.views, (self.batch,), generator=generator).numpy()
        about = self.cache.rows(rows)
        noise = torch.randn(about["target"].shape, generator=generator)
        if from_main(lambda: self._read(number) is not None):
            end = self._read(number)
            assert end is not None, "the processes of a run see the same folder"
            return Block(rows, noise, end)
        if number < self.settings.ahead:
            logger.info("the teacher finds %d ends, %d of %d blocks", self.batch, number + 1, self.settings.ahead)
        state = processes()
        mine = rank_slice({**about, "noise": noise}, state.process_index, state.num_processes)
        mine = {name: tensor.to(state.device) for name, tensor in mine.items()}
        with torch.no_grad():
            found = self.teacher.sample(mine["noise"], condition_of(mine, self.dit), self.table, guidance=self.guidance)
        end = gather(found) if state.num_processes > 1 else found
        assert isinstance(end, Tensor)
        end = end.float().cpu()
        on_main(lambda: save_tensors(self._file(number), {"end": end}))
        return Block(rows, noise, end)

    def _read(self, number: int) -> Latent | None:
        try:
            return load_file(self._file(number))["end"]
        except (OSError, SafetensorError, KeyError):  # not there, or not whole: it is found again
            return None
