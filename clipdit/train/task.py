"""What the loop needs of whatever is trained: a task draws a batch, says what is lost on it, and writes what it has learnt."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

Batch = dict[str, Tensor]
"""Tensors whose first axis is the image; on the CPU when drawn."""
Losses = dict[str, Float[Tensor, "B"]]
"""Name -> the loss of each image. A loss that skips an image gives it 0, so that means over parts of a batch add up."""


@runtime_checkable
class Task(Protocol):
    """A task is an nn.Module: its parameters that require a gradient are what is trained, `forward` is Batch -> Losses."""

    @property
    def module(self) -> nn.Module:
        """The network(s); `forward(batch)` returns Losses."""
        ...

    @property
    def weights(self) -> dict[str, float]:
        """Name of a loss -> its factor in the sum that is minimised. What is not named is reported only."""
        ...

    @property
    def contested(self) -> frozenset[str]:
        """Losses by which one network gains what another loses. They are minimised, but `total` leaves them out: they would not
        tell whether training goes well."""
        ...

    def draw(self, step: int) -> Batch:
        """The whole batch of this step, for all processes: a function of the step alone."""
        ...

    def save(self, folder: Path) -> None:
        """Write the parts of the checkpoint that training changes, each file atomically."""
        ...

    def sheet(self, path: Path) -> None:
        """A picture of what the network does now."""
        ...
