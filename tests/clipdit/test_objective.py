"""What every objective promises, whichever it is; the training loop relies on nothing else."""

import dataclasses

import pytest
import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

from clipdit.diffusion import DDPM
from clipdit.flow import FlowMatching
from clipdit.objective import draw_noised, objective_from
from clipdit.sampling import DDPM_SOLVERS, FLOW_SOLVERS, sample

OBJECTIVES = {
    "flow": FlowMatching(),
    "flow uniform shifted": FlowMatching(times="uniform", train_shift=3.0),
    "ddpm": DDPM(),
    "ddpm scaled": DDPM(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "ddpm cosine min-snr": DDPM(schedule="squaredcos_cap_v2", min_snr_gamma=5.0),
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
KEPT = [FlowMatching(solver=s, shift=2.5) for s in FLOW_SOLVERS] + [
    DDPM(solver=s, schedule=c, timesteps=500) for s in DDPM_SOLVERS for c in ("linear", "squaredcos_cap_v2")
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(batch=64):
    return 0.5 + 2 * torch.randn(batch, 4, 8, 8, generator=generator(9))


@every_objective
def test_a_perfect_prediction_gives_the_target_back(objective):
    target = latents()
    noised = draw_noised(objective, target, generator())
    estimate = objective.estimate_target(noised.x, noised.t, noised.prediction_target)
    alpha = objective.signal_level(noised.t).reshape(-1, 1, 1, 1)
    # the rounding of x comes back divided by the share of signal in it
    assert ((estimate - target).abs() * alpha.clamp(min=1e-4)).max() < 1e-5


@every_objective
def test_x_and_noise_agree_with_the_signal_level(objective):
    """x = alpha target + sigma noise, and alpha / (alpha + sigma) is what signal_level says."""
    t = objective.sample_times(64, generator())
    ones, zeros = torch.ones(64, 1, 1, 1), torch.zeros(64, 1, 1, 1)
    alpha = objective.noised(ones, zeros, t).x.flatten()
    sigma = objective.noised(zeros, ones, t).x.flatten()
    torch.testing.assert_close(objective.signal_level(t), alpha / (alpha + sigma))


@every_objective
def test_signal_level_rises_from_noise_to_target(objective):
    level = objective.signal_level(torch.linspace(0, 1, 101))
    assert (level.diff() > 0).all()
    assert 0 <= level[0] < 0.01 or "scaled" in str(objective)  # scaled_linear famously ends with some signal left
    assert 0.97 < level[-1] <= 1


@every_objective
def test_training_draws_follow_the_generator_alone(objective):
    target = latents(8)
    first, again, other = (draw_noised(objective, target, generator(seed)) for seed in (1, 1, 2))
    for field in dataclasses.fields(first):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name))
    assert not torch.equal(first.x, other.x)
    assert not torch.equal(first.t, other.t)


@every_objective
def test_a_share_of_the_batch_is_noised_as_in_the_whole(objective):
    """What lets two processes do half a batch each and get the same losses."""
    target, t = latents(8), objective.sample_times(8, generator())
    noise = torch.randn(8, 4, 8, 8, generator=generator(3))
    whole, half = objective.noised(target, noise, t), objective.noised(target[4:], noise[4:], t[4:])
    for field in dataclasses.fields(whole):
        assert torch.equal(getattr(whole, field.name)[4:], getattr(half, field.name))


@every_objective
def test_half_precision_targets_are_noised_in_float32(objective):
    noised = draw_noised(objective, latents(4).to(torch.bfloat16), generator())
    assert {getattr(noised, f.name).dtype for f in dataclasses.fields(noised)} == {torch.float32}


@every_objective
def test_times_lie_where_the_network_expects_them(objective):
    t = objective.sample_times(5000, generator())
    assert t.dtype == torch.float32
    assert t.min() >= 0
    assert t.max() <= 1
    assert t.min() < 0.05
    assert t.max() > 0.9


@pytest.mark.parametrize("objective", KEPT, ids=lambda o: f"{type(o).__name__}-{o.solver}")
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_network_that_knows_the_target_reaches_it_with_any_solver(objective, steps):
    target = latents(2).double()

    def know(x, t):
        alpha, sigma = (
            (t, 1 - t) if isinstance(objective, FlowMatching) else objective.levels((499 - t * 500).round().long(), x.dtype)
        )
        alpha, sigma = alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)
        noise = (x - alpha * target) / sigma
        return target - noise if isinstance(objective, FlowMatching) else noise

    start = torch.randn(target.shape, generator=generator(), dtype=torch.float64)
    out = sample(know, start, objective.table(steps), step_noise=lambda i: torch.randn_like(start))
    torch.testing.assert_close(out, target, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", KEPT, ids=lambda o: f"{type(o).__name__}-{o.solver}")
def test_the_saved_scheduler_says_how_to_sample(objective, tmp_path):
    scheduler = objective.to_scheduler()
    scheduler.save_pretrained(tmp_path)
    loaded = objective_from(type(scheduler).from_pretrained(tmp_path))
    assert loaded == objective
    assert loaded.table(4) == objective.table(4)


@pytest.mark.parametrize(
    ("objective", "changed"),
    [
        (FlowMatching(), {"use_karras_sigmas": True}),
        (FlowMatching(), {"use_dynamic_shifting": True}),
        (FlowMatching(solver="dpmpp_2m"), {"solver_order": 3}),
        (FlowMatching(solver="dpmpp_2m"), {"prediction_type": "epsilon"}),
        (DDPM(), {"prediction_type": "v_prediction"}),
        (DDPM(), {"timestep_spacing": "leading"}),
        (DDPM(), {"clip_sample": True}),
        (DDPM(solver="ddpm"), {"variance_type": "fixed_large"}),
        (DDPM(), {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True}),
    ],
)
def test_a_scheduler_setting_that_would_be_ignored_is_refused(objective, changed):
    scheduler = objective.to_scheduler()
    altered = type(scheduler).from_config(scheduler.config, **changed)
    with pytest.raises(ValueError, match=f"{list(changed)[-1]} = {list(changed.values())[-1]!r}; clipdit samples with"):
        objective_from(altered)


def test_an_unknown_scheduler_is_refused():
    with pytest.raises(ValueError, match="EulerDiscreteScheduler; DDPM takes DDIMScheduler"):
        objective_from(EulerDiscreteScheduler())
