"""Flow matching: the path, the velocity, and where on the path training looks."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError

from clipdit.flow import FlowMatching, estimate_target, interpolate, sample_times, velocity_target
from clipdit.objective import draw_noised
from clipdit.presets import edges2emoji, yardstick
from clipdit.sampling import shift_time


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pair():
    noise, target = torch.randn(2, 6, 4, 5, 3, generator=generator(), dtype=torch.float64)
    return noise, target


def test_the_path_starts_at_noise_and_ends_at_the_target(pair):
    noise, target = pair
    assert torch.equal(interpolate(noise, target, torch.zeros(6)), noise)
    assert torch.equal(interpolate(noise, target, torch.ones(6)), target)
    quarter = interpolate(noise, target, torch.full((6,), 0.25))
    torch.testing.assert_close(quarter, 0.75 * noise + 0.25 * target)


def test_each_image_has_its_own_time(pair):
    noise, target = pair
    t = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    x = interpolate(noise, target, t)
    for i in range(6):
        assert torch.equal(x[i : i + 1], interpolate(noise[i : i + 1], target[i : i + 1], t[i : i + 1]))


def test_velocity_is_the_derivative_of_the_path(pair):
    noise, target = pair
    t = torch.linspace(0.1, 0.8, 6, dtype=torch.float64)
    difference = (interpolate(noise, target, t + 1e-3) - interpolate(noise, target, t - 1e-3)) / 2e-3
    torch.testing.assert_close(velocity_target(noise, target), difference)


def test_estimated_target_inverts_the_path(pair):
    noise, target = pair
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    x = interpolate(noise, target, t)
    torch.testing.assert_close(estimate_target(x, t, velocity_target(noise, target)), target)


def test_training_target_has_mean_target_and_unit_variance_around_it():
    target = torch.full((500, 4, 8, 8), 0.8)
    noised = draw_noised(FlowMatching(), target, generator())
    assert noised.prediction_target.mean().item() == pytest.approx(0.8, abs=0.01)
    assert noised.prediction_target.std().item() == pytest.approx(1.0, abs=0.01)
    assert torch.equal(noised.weight, torch.ones(500))


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.7, 1.0, 1.0), (0.0, 0.5, 1.0), (-0.3, 1.2, 3.0)])
def test_logit_normal_times_have_its_quantiles(mean, std, shift):
    t = sample_times(40_000, generator(), mean=mean, std=std, shift=shift)
    for z, share in [(-1.0, 0.1587), (0.0, 0.5), (1.0, 0.8413)]:
        quantile = shift_time(1 / (1 + math.exp(-(mean + std * z))), shift)
        assert (t < quantile).float().mean().item() == pytest.approx(share, abs=0.01)


def test_uniform_times_are_uniform():
    t = sample_times(40_000, generator(), distribution="uniform")
    histogram = torch.histc(t, bins=10, min=0, max=1) / len(t)
    assert (histogram - 0.1).abs().max() < 0.01


def test_a_share_of_the_times_is_the_noise_itself():
    plain, some = FlowMatching(times="uniform", at_noise=0.0), FlowMatching(times="uniform", at_noise=0.5)
    t = some.sample_times(20_000, torch.Generator().manual_seed(0))
    assert 0.48 < (t == 0).float().mean() < 0.52
    assert 0.48 < t[t > 0].mean() < 0.52
    assert (plain.sample_times(1000, torch.Generator().manual_seed(0)) > 0).all()
    with pytest.raises(ValueError, match=r"at_noise is 1.5; wanted a share in \[0, 1\]"):
        FlowMatching(at_noise=1.5)


def test_a_tenth_is_there_unless_told_otherwise_and_none_of_the_yardsticks():
    def share(objective: FlowMatching) -> float:
        return (objective.sample_times(20_000, torch.Generator().manual_seed(0)) == 0).float().mean().item()

    assert share(FlowMatching()) == share(edges2emoji().objective) == pytest.approx(0.1, abs=0.01)
    assert share(yardstick().objective) == 0


def test_shift_above_one_trains_nearer_the_noise():
    plain, shifted = (sample_times(1000, generator(), shift=shift) for shift in (1.0, 3.0))
    assert (shifted < plain).all()
    torch.testing.assert_close(1 - shifted, 3 * (1 - plain) / (1 + 2 * (1 - plain)))  # diffusers' formula, of sigma


def test_sampling_shift_is_not_the_training_shift():
    objective = FlowMatching(shift=3.0)
    assert torch.equal(objective.sample_times(8, generator()), FlowMatching().sample_times(8, generator()))
    assert objective.table(4).times[2] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"std": 0.0}, "std is 0.0"),
        ({"shift": -1.0}, "shift is -1.0"),
        ({"train_shift": float("nan")}, "train_shift is nan"),
        ({"mean": float("inf")}, "mean is inf"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        FlowMatching(**wrong)


@pytest.mark.parametrize("wrong", [{"times": "cosine"}, {"solver": "ddim"}])
def test_a_name_outside_the_list_is_refused(wrong):
    with pytest.raises((ValueError, TypeCheckError), match="|".join(wrong.values())):  # with runtime types on, these speak first
        FlowMatching(**wrong)


def test_unknown_distribution_is_named():
    with pytest.raises((ValueError, TypeCheckError), match="beta"):
        sample_times(4, generator(), distribution="beta")
