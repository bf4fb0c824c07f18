"""Consistency models: where a path ends, in one step or with noise in between."""

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler

from clipdit.consistency import Consistency
from clipdit.objective import Objective, draw_noised, objective_from
from clipdit.sampling import sample


def test_one_step_goes_straight_to_the_end():
    noise, end = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    made = sample(lambda x, t: end - x, noise, Consistency().table(1))
    torch.testing.assert_close(made, end)


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_more_steps_noise_the_end_to_the_next_time_and_ask_again(steps: int):
    noise, seen = torch.randn(2, 3, 4, 4), []

    def chord(x, t):
        seen.append((x, float(t[0])))
        return (torch.full_like(x, len(seen)) - x) / (1 - t.reshape(-1, 1, 1, 1))  # the k-th end is k

    fresh = [torch.randn(2, 3, 4, 4) for _ in range(steps)]
    made = sample(chord, noise, Consistency().table(steps), step_noise=lambda i: fresh[i])
    torch.testing.assert_close(made, torch.full_like(made, float(steps)))
    for k in range(1, steps):
        x, t = seen[k]
        assert t == pytest.approx(k / steps)
        torch.testing.assert_close(x, t * k + (1 - t) * fresh[k - 1], atol=1e-5, rtol=1e-5)


def test_its_scheduler_is_diffusers_and_steps_alike():
    scheduler = Consistency().to_scheduler()
    assert objective_from(scheduler) == Consistency()
    assert objective_from(Consistency(shift=2.0).to_scheduler()) == Consistency(shift=2.0)
    steps, x = 4, torch.randn(1, 2, 4, 4)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    theirs = x
    generator, draws = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(-torch.tanh(theirs), timestep, theirs, generator=generator).prev_sample
    ours = sample(
        lambda x, t: torch.tanh(x), x, Consistency().table(steps), step_noise=lambda i: torch.randn(x.shape, generator=draws)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_training_looks_at_the_beginnings_of_intervals_and_weighs_the_end():
    objective, target = Consistency(intervals=4), torch.randn(64, 2, 4, 4)
    assert isinstance(objective, Objective)
    noised = draw_noised(objective, target, torch.Generator().manual_seed(0))
    assert set(noised.t.tolist()) == {0.0, 0.25, 0.5, 0.75}
    torch.testing.assert_close(noised.weight, (1 - noised.t) ** 2)
    torch.testing.assert_close(objective.estimate_target(noised.x, noised.t, noised.prediction_target), target)


@pytest.mark.parametrize(("steps", "solver", "message"), [(0, None, "steps is 0"), (1, "euler", "takes consistency")])
def test_other_steps_and_solvers_are_refused(steps, solver, message):
    with pytest.raises(ValueError, match=message):
        Consistency().table(steps, solver)


@pytest.mark.parametrize(("changes", "message"), [({"intervals": 1}, "intervals is 1"), ({"shift": 0.0}, "shift is 0")])
def test_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        Consistency(**changes)


def test_a_scheduler_that_samples_otherwise_is_refused():
    with pytest.raises(ValueError, match="use_karras_sigmas"):
        objective_from(FlowMatchLCMScheduler(use_karras_sigmas=True))
