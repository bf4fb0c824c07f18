"""Who sees which example when: a pure function of the seed and the step.

Nothing about the order or the randomness of training lives in a generator that would have to be saved. The batch of step s, and
every random number it needs, follow from (seed, s) alone; so a resumed run is the uninterrupted one, and two processes that take
the halves of the same batch are one process.
"""

import functools

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def batch_indices(size: int, batch: int, step: int, seed: int) -> Int[np.ndarray, "batch"]:
    """Which of `size` examples make the batch of this step: epochs of shuffled order, one after the other, without a gap."""
    positions = np.arange(step * batch, (step + 1) * batch)
    return np.array([_permutation(seed, int(p) // size, size)[int(p) % size] for p in positions])


def step_generator(seed: int, step: int, purpose: int | None = None) -> torch.Generator:
    """The CPU generator for all randomness of one step's batch (noise, times, dropout, crops), or for another purpose."""
    key = (seed, step) if purpose is None else (seed, step, purpose)
    bits = int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0])
    return torch.Generator().manual_seed(bits)


def rank_slice(batch: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """This process's share of a global batch: consecutive rows, equal shares."""
    size = len(next(iter(batch.values())))
    share = size // world
    return {name: rows[rank * share : (rank + 1) * share] for name, rows in batch.items()}
