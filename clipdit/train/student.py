"""The teacher of a consistency model (`clipdit.consistency`): says where the student should end from each point.

Consistency distillation (Song et al. 2023, alg. 2): from (x, t) the teacher takes one Euler step, guided as it is in use, and the
end that the student itself names from there is what it should name from (x, t), too. So what the teacher needs twenty steps and
guidance's second evaluation for becomes one evaluation. The student that is asked is the one being trained, without gradient and
not averaged (Song & Dhariwal 2024, sec. 3.2).
"""

import torch
from torch import nn

from clipdit.backend import Condition
from clipdit.model.network import Network
from clipdit.sampling import guide
from clipdit.shapes import Latent, Time


class Teacher(nn.Module):
    """A frozen network of flow matching.

    Args:
        dit: predicts velocity.
        guidance: with which it is followed; the student needs none then.
        intervals: Euler steps from noise to target, of which it takes one at a time.
    """

    def __init__(self, dit: Network, *, guidance: float, intervals: int):
        super().__init__()
        self.dit, self.guidance, self.intervals = dit.requires_grad_(False).eval(), guidance, intervals

    def train(self, mode: bool = True) -> "Teacher":
        return self  # it learns nothing

    @torch.no_grad()
    def chord(self, student: Network, x: Latent, t: Time, condition: Condition) -> Latent:
        """What `student` should predict at (x, t), t < 1: the way to its own end from the next point, over 1 - t."""
        then = (t + 1 / self.intervals).clamp(max=1)
        velocity = guide(self.dit, condition, self.guidance)(x, t).float()
        reached = x + _wide(then - t) * velocity
        rest = _wide(1 - then)
        end = reached + rest * student(reached, then, condition).float()
        return torch.where(rest > 0.5 / self.intervals, (end - x) / _wide(1 - t), velocity)


def _wide(t: Time) -> torch.Tensor:
    return t.reshape(-1, 1, 1, 1)
