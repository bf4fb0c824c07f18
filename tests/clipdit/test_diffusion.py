"""DDPM: noise levels as diffusers has them, and times that carry back to the same step."""

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from jaxtyping import TypeCheckError

from clipdit.diffusion import DDPM, alphas_cumprod, step_of_time, time_of_step
from clipdit.objective import draw_noised

SCHEDULES = [("linear", 1e-4, 0.02), ("scaled_linear", 0.00085, 0.012), ("squaredcos_cap_v2", 1e-4, 0.02)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(batch=8):
    return torch.randn(batch, 4, 8, 8, generator=generator(4), dtype=torch.float64)


@pytest.mark.parametrize("timesteps", [1000, 200])
@pytest.mark.parametrize(("schedule", "start", "end"), SCHEDULES)
def test_noise_levels_are_diffusers(schedule, start, end, timesteps):
    theirs = DDPMScheduler(timesteps, beta_schedule=schedule, beta_start=start, beta_end=end)
    ours = alphas_cumprod(schedule, timesteps, start, end)
    torch.testing.assert_close(ours.float(), theirs.alphas_cumprod, rtol=2e-4, atol=1e-6)  # theirs multiplies in float32
    assert (ours.diff() < 0).all()


@pytest.mark.parametrize(("schedule", "start", "end"), SCHEDULES)
def test_noise_is_added_as_diffusers_does(schedule, start, end):
    objective = DDPM(schedule=schedule, beta_start=start, beta_end=end)
    theirs = DDPMScheduler(beta_schedule=schedule, beta_start=start, beta_end=end)
    theirs.alphas_cumprod = objective.alphas_cumprod
    target, noise, n = latents(), latents().flip(0), torch.tensor([0, 1, 50, 300, 500, 900, 998, 999])
    torch.testing.assert_close(objective.add_noise(target, noise, n), theirs.add_noise(target, noise, n), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("timesteps", [2, 7, 1000, 4096, 10_000])
def test_every_step_has_a_time_that_leads_back_to_it(timesteps):
    n = torch.arange(timesteps)
    t = time_of_step(n, timesteps)
    assert torch.equal(step_of_time(t, timesteps), n)
    assert t[-1] == 0
    assert t[0].item() == pytest.approx(1 - 1 / timesteps)
    assert (t.diff() < 0).all()


def test_the_target_itself_counts_as_the_cleanest_step():
    assert step_of_time(torch.tensor([0.0, 1.0]), 1000).tolist() == [999, 0]


def test_table_and_training_agree_on_the_time_of_a_step():
    objective = DDPM()
    times = torch.tensor(objective.table(1000).times)
    assert torch.equal(times, time_of_step(torch.arange(999, -1, -1), 1000))


@pytest.mark.parametrize(("schedule", "start", "end"), SCHEDULES)
def test_estimated_target_inverts_added_noise(schedule, start, end):
    objective = DDPM(schedule=schedule, beta_start=start, beta_end=end)
    target, noise, n = latents(), latents().flip(0), torch.tensor([0, 1, 50, 300, 500, 900, 998, 999])
    x, t = objective.add_noise(target, noise, n), time_of_step(n, 1000)
    torch.testing.assert_close(objective.estimate_target(x, t, noise), target, rtol=1e-9, atol=1e-9)


def test_training_target_is_standard_normal_and_x_keeps_unit_variance():
    target = torch.randn(500, 4, 8, 8, generator=generator(1))
    noised = draw_noised(DDPM(), target, generator(2))
    assert noised.prediction_target.mean().item() == pytest.approx(0, abs=0.01)
    assert noised.prediction_target.std().item() == pytest.approx(1, abs=0.01)
    assert noised.x.std().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(noised.prediction_target, noised.noise)


def test_training_visits_all_steps_alike():
    t = DDPM(timesteps=20).sample_times(40_000, generator())
    counts = torch.bincount(step_of_time(t, 20), minlength=20) / 40_000
    assert (counts - 0.05).abs().max() < 0.006


def test_min_snr_weight_is_one_at_high_noise_and_gamma_over_snr_at_low():
    objective, n = DDPM(min_snr_gamma=5.0), torch.arange(1000)
    chain = objective.alphas_cumprod
    snr = chain / (1 - chain)
    torch.testing.assert_close(objective.weight(n), (snr.clamp(max=5.0) / snr).float())
    assert objective.weight(n)[-1] == 1
    assert torch.equal(DDPM().weight(n), torch.ones(1000))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"timesteps": 1}, "timesteps is 1"),
        ({"timesteps": 20_000}, "timesteps is 20000"),
        ({"beta_start": 0.03}, "betas run from 0.03 to 0.02"),
        ({"beta_end": 1.0}, "betas run from 0.0001 to 1.0"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma is 0.0"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        DDPM(**wrong)


@pytest.mark.parametrize("wrong", [{"schedule": "cosine"}, {"solver": "euler"}])
def test_a_name_outside_the_list_is_refused(wrong):
    with pytest.raises((ValueError, TypeCheckError), match="|".join(wrong.values())):  # with runtime types on, these speak first
        DDPM(**wrong)
