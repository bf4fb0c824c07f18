"""Models of one evaluation: their table is the prediction, and no other number of steps is had."""

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from clipdit.direct import Direct
from clipdit.objective import Objective, draw_noised, objective_from
from clipdit.sampling import sample


def test_the_loop_gives_what_the_network_says():
    said = torch.randn(2, 3, 4, 4)
    asked = []

    def network(x, t):
        asked.append((x, t))
        return said

    noise = torch.randn(2, 3, 4, 4)
    assert torch.equal(sample(network, noise, Direct().table(1)), said)
    ((x, t),) = asked
    assert torch.equal(x, noise) and torch.equal(t, torch.zeros(2))


@pytest.mark.parametrize(("steps", "solver", "message"), [(2, None, "2 sampling steps.* Use 1"), (1, "euler", "takes direct")])
def test_other_steps_and_solvers_are_refused(steps: int, solver: str | None, message: str):
    with pytest.raises(ValueError, match=message):
        Direct().table(steps, solver)


def test_training_asks_for_the_target_at_the_noise():
    objective, target = Direct(), torch.randn(3, 2, 4, 4)
    assert isinstance(objective, Objective)
    noised = draw_noised(objective, target, torch.Generator().manual_seed(0))
    assert torch.equal(noised.x, noised.noise) and torch.equal(noised.prediction_target, target)
    assert torch.equal(noised.t, torch.zeros(3)) and torch.equal(noised.weight, torch.ones(3))
    assert torch.equal(objective.estimate_target(noised.x, noised.t, target), target)


def test_its_scheduler_is_diffusers_ddim_of_one_step_and_comes_back():
    scheduler = Direct().to_scheduler()
    assert objective_from(scheduler) == Direct()
    scheduler.set_timesteps(1)
    noise, said = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(scheduler.step(said, scheduler.timesteps[0], noise).prev_sample, said)


def test_a_scheduler_that_samples_otherwise_is_refused():
    with pytest.raises(ValueError, match="num_train_timesteps"):
        objective_from(DDIMScheduler(num_train_timesteps=1000, prediction_type="sample", clip_sample=False))
