"""The tables do what diffusers' schedulers do, the loop does what the tables say, and noise belongs to its seed."""

import math
import sys

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler

from clipdit.backend import Condition
from clipdit.diffusion import alphas_cumprod
from clipdit.sampling import (
    DDPM_SOLVERS,
    FLOW_SOLVERS,
    LOWEST_HALF_LOG_SNR,
    Row,
    SamplingTable,
    advance,
    ddpm_table,
    flow_table,
    guide,
    sample,
    seeded_noise,
    shift_time,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on numpy 2

BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": (1e-4, 0.02)}
STEPS = [1, 2, 4, 20]
LINEAR = alphas_cumprod("linear", 1000, *BETAS["linear"])
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Double:
    """torch, with float64 under the name of float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def diffusers_in_float64(monkeypatch):
    """Its schedulers cast x to float32 in every step; without that they can be compared to the last digits."""
    for scheduler in (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, DPMSolverMultistepScheduler):
        monkeypatch.setattr(sys.modules[scheduler.__module__], "torch", Double())


def network(x, t):
    """A fixed nonlinear function that mixes channels: no solver is exact on it, so a wrong coefficient shows."""
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x.dtype)
    t = t.to(x.dtype).reshape(-1, 1, 1, 1)
    return torch.tanh(torch.einsum("ij,bjhw->bihw", mix, x) + t) + 0.3 * torch.sin(3 * x - 2 * t)


@pytest.fixture
def noise():
    return torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def at(time, x):
    return torch.full((len(x),), float(time), dtype=torch.float64)


# ---- against diffusers


def use_sigmas_of(table, scheduler):
    """Its sigmas are ours up to the rounding of its set_timesteps; from here on it uses ours."""
    sigmas = torch.tensor([*(1 - time for time in table.times), 0.0], dtype=torch.float64)
    torch.testing.assert_close(scheduler.sigmas.double(), sigmas, rtol=1e-6, atol=1e-6)
    scheduler.sigmas = sigmas


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", STEPS)
def test_euler_is_diffusers_flow_match_euler_on_fluxs_sigmas(steps, shift, noise):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    x, table = noise, flow_table(steps, "euler", shift=shift)
    use_sigmas_of(table, scheduler)
    scheduler.set_begin_index(0)
    for time, timestep in zip(table.times, scheduler.timesteps, strict=True):
        x = scheduler.step(-network(x, at(time, x)), timestep, x).prev_sample  # its velocity is noise - target
    torch.testing.assert_close(sample(network, noise, table), x, **EXACT)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", STEPS)
def test_heun_is_diffusers_flow_match_heun_on_the_same_sigmas(steps, shift, noise):
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)
    grid = [1 - shift_time(i / steps, shift) for i in range(steps)]
    # its set_timesteps takes no sigmas: lay ours out as it does, every inner one twice
    doubled = torch.tensor(grid[:1] + [sigma for sigma in grid[1:] for _ in range(2)], dtype=torch.float64)
    scheduler.timesteps, scheduler.sigmas = doubled * 1000, torch.cat([doubled, doubled.new_zeros(1)])
    x, table = noise, flow_table(steps, "heun", shift=shift)
    scheduler.set_begin_index(0)
    for timestep in scheduler.timesteps:
        x = scheduler.step(-network(x, at(1 - timestep / 1000, x)), timestep, x).prev_sample
    torch.testing.assert_close(sample(network, noise, table), x, **EXACT)
    assert table.times == pytest.approx((1 - doubled).tolist())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", STEPS)
def test_flow_dpmpp_2m_is_diffusers_multistep_with_flow_sigmas(steps, shift, noise):
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    x, table = noise, flow_table(steps, "dpmpp_2m", shift=shift)
    use_sigmas_of(table, scheduler)
    for time, timestep in zip(table.times, scheduler.timesteps, strict=True):
        x = scheduler.step(-network(x, at(time, x)), timestep, x).prev_sample
    torch.testing.assert_close(sample(network, noise, table), x, **EXACT)


def diffusion(kind, schedule, **settings):
    """The scheduler with our float64 noise levels in place of its float32 ones."""
    start, end = BETAS[schedule]
    scheduler = kind(beta_schedule=schedule, beta_start=start, beta_end=end, timestep_spacing="trailing", **settings)
    ours = alphas_cumprod(schedule, 1000, start, end)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), ours, rtol=1e-3, atol=1e-6)
    scheduler.alphas_cumprod = ours
    return scheduler


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("steps", STEPS)
def test_ddim_is_diffusers_ddim(steps, schedule, noise):
    scheduler = diffusion(DDIMScheduler, schedule, clip_sample=False)
    scheduler.set_timesteps(steps)
    x, table = noise, ddpm_table(scheduler.alphas_cumprod, steps, "ddim")
    for timestep in scheduler.timesteps.tolist():
        x = scheduler.step(network(x, at((999 - timestep) / 1000, x)), timestep, x).prev_sample
    assert table.times == pytest.approx(((999 - scheduler.timesteps) / 1000).tolist())
    torch.testing.assert_close(sample(network, noise, table), x, **EXACT)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("steps", STEPS)
def test_ddpm_is_diffusers_ancestral_sampler_for_the_same_fresh_noise(steps, schedule, noise):
    scheduler = diffusion(DDPMScheduler, schedule, clip_sample=False)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(7)
    x = noise
    for timestep in scheduler.timesteps.tolist():
        x = scheduler.step(network(x, at((999 - timestep) / 1000, x)), timestep, x, generator=generator).prev_sample
    generator.manual_seed(7)
    table = ddpm_table(scheduler.alphas_cumprod, steps, "ddpm")
    fresh = [torch.randn(noise.shape, generator=generator, dtype=noise.dtype) for _ in range(steps)]
    ours = sample(network, noise, table, step_noise=lambda i: fresh[i])
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)  # diffusers adds 1e-10 of noise to the last step


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("steps", STEPS)
def test_dpmpp_2m_is_diffusers_multistep(steps, schedule, noise):
    scheduler = diffusion(DPMSolverMultistepScheduler, schedule)
    scheduler.set_timesteps(steps)
    levels = scheduler.alphas_cumprod[scheduler.timesteps]
    scheduler.sigmas = torch.cat([((1 - levels) / levels).sqrt(), levels.new_zeros(1)])  # set_timesteps rounds them to float32
    x, table = noise, ddpm_table(scheduler.alphas_cumprod, steps, "dpmpp_2m")
    for timestep in scheduler.timesteps.tolist():
        x = scheduler.step(network(x, at((999 - timestep) / 1000, x)), timestep, x).prev_sample
    torch.testing.assert_close(sample(network, noise, table), x, **EXACT)


def test_ddpm_steps_are_diffusers_trailing_ones():
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    for steps in (*range(1, 48), 50, 64, 75, 100, 125, 200, 250, 333, 500, 1000):
        scheduler.set_timesteps(steps)
        assert ddpm_table(LINEAR, steps).times == tuple((999 - n) / 1000 for n in scheduler.timesteps.tolist())


def test_cosine_sampling_skips_the_steps_that_are_all_noise():
    levels = alphas_cumprod("squaredcos_cap_v2", 1000, 0.5, 0.5)
    start = 999 - round(ddpm_table(levels, 4).times[0] * 1000)
    half_log_snr = 0.5 * (levels / (1 - levels)).log()
    assert half_log_snr[start] >= LOWEST_HALF_LOG_SNR > half_log_snr[start + 1]
    assert 990 < start < 999
    with pytest.raises(ValueError, match=f"at most {start + 1}"):
        ddpm_table(levels, start + 2)


# ---- against closed forms: targets are Gaussian, mean MU and standard deviation SPREAD

MU, SPREAD = 0.7, 0.4


def gaussian_velocity(x, t):
    """E[target - noise | x_t] for independent Gaussian target and noise."""
    t = t.reshape(-1, 1, 1, 1)
    gain = (t * SPREAD**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * SPREAD**2)
    return MU + gain * (x - t * MU)


def gaussian_noise(levels):
    def predict(x, t):
        n = (999 - (t * 1000).round().long()).reshape(-1, 1, 1, 1)
        alpha, sigma = levels[n].sqrt(), (1 - levels[n]).sqrt()
        return sigma * (x - alpha * MU) / (alpha**2 * SPREAD**2 + sigma**2)

    return predict


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_halving_the_step_divides_the_error_by_two_to_the_order(solver, order, noise):
    errors = []
    for steps in (20, 40, 80):
        error = sample(gaussian_velocity, noise, flow_table(steps, solver)) - (MU + SPREAD * noise)
        errors.append(error.abs().max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.1)


def test_two_step_memory_is_worth_its_keep(noise):
    """At equal evaluations DPM-Solver++(2M) is far nearer to the exact flow than the solvers that remember nothing."""
    exact = MU + SPREAD * noise
    euler, flow_2m = ((sample(gaussian_velocity, noise, flow_table(16, s)) - exact).abs().max() for s in ("euler", "dpmpp_2m"))
    assert flow_2m < 0.2 * euler
    alpha, sigma = LINEAR[-1].sqrt(), (1 - LINEAR[-1]).sqrt()
    exact = MU + SPREAD * (noise - alpha * MU) / (alpha**2 * SPREAD**2 + sigma**2).sqrt()
    ddim, ddpm_2m = (
        (sample(gaussian_noise(LINEAR), noise, ddpm_table(LINEAR, 50, s)) - exact).abs().max() for s in ("ddim", "dpmpp_2m")
    )
    assert ddpm_2m < 0.1 * ddim


def test_ancestral_sampling_reaches_the_targets_distribution():
    shape, generator = (1, 1, 100, 100), torch.Generator().manual_seed(3)

    def draw(_):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = sample(gaussian_noise(LINEAR), draw(0), ddpm_table(LINEAR, 1000, "ddpm"), step_noise=draw)
    assert x.mean().item() == pytest.approx(MU, abs=0.01)
    assert x.std().item() == pytest.approx(SPREAD, rel=0.02)


# ---- the loop


TABLES = [flow_table(5, s) for s in FLOW_SOLVERS] + [ddpm_table(LINEAR, 5, s) for s in DDPM_SOLVERS]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table.solver}-{len(table.rows)}")
def test_constants_read_from_a_tensor_give_the_same_result(table, noise):
    fresh = [torch.randn(noise.shape, dtype=noise.dtype, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    x, memory = noise, torch.zeros_like(noise)
    for i, row in enumerate(table.tensor(dtype=torch.float64)):
        row = Row(*row.unbind())
        f = network(x, row.time.expand(len(x)))
        x, memory = advance(x, f, row, memory, fresh[i]), x + row.e * f
    torch.testing.assert_close(sample(network, noise, table, step_noise=lambda i: fresh[i]), x, **EXACT)


def test_the_loop_unrolls_into_one_graph_for_any_batch(noise):
    class Loop(torch.nn.Module):
        def forward(self, noise):
            return sample(network, noise, flow_table(3, "heun"))

    batch = torch.export.Dim("B", min=2, max=64)
    graph = torch.export.export(Loop(), (noise,), dynamic_shapes=({0: batch},)).module()
    other = torch.cat([noise, -noise, noise + 1])
    torch.testing.assert_close(graph(other), Loop()(other), **EXACT)


def test_float32_loop_agrees_with_float64(noise):
    for table in [flow_table(20, s) for s in FLOW_SOLVERS]:
        torch.testing.assert_close(
            sample(network, noise.float(), table), sample(network, noise, table).float(), rtol=1e-4, atol=1e-5
        )


def test_x_is_carried_in_float32_for_a_bfloat16_network(noise):
    seen = set()

    def velocity(x, t):
        seen.add((x.dtype, t.dtype))
        return network(x.float(), t).to(torch.bfloat16)

    low = sample(velocity, noise.to(torch.bfloat16), flow_table(50))
    assert seen == {(torch.bfloat16, torch.float32)}
    assert low.dtype == torch.bfloat16
    high = sample(network, noise.to(torch.bfloat16).double(), flow_table(50))
    assert (low.double() - high).abs().mean() < 0.01


def test_the_loop_leaves_its_noise_alone_and_reports_every_row(noise):
    before, seen = noise.clone(), []
    table = flow_table(3, "heun")
    out = sample(network, noise, table, on_step=lambda i, x: seen.append((i, x)))
    assert torch.equal(noise, before)
    assert [i for i, _ in seen] == list(range(len(table.rows))) == list(range(5))
    assert torch.equal(seen[-1][1], out)


def test_each_image_is_sampled_by_itself(noise):
    table = flow_table(4, "dpmpp_2m")
    together = sample(network, noise, table)
    for i in range(len(noise)):
        torch.testing.assert_close(sample(network, noise[i : i + 1], table), together[i : i + 1], **EXACT)


def test_stochastic_table_without_step_noise_is_refused(noise):
    table = ddpm_table(LINEAR, 4, "ddpm")
    assert table.stochastic and not flow_table(4).stochastic
    with pytest.raises(ValueError, match="pass step_noise"):
        sample(network, noise, table)


def test_tables_are_values():
    assert flow_table(4, "heun") == flow_table(4, "heun")
    assert len({flow_table(4), flow_table(4), flow_table(5)}) == 2
    assert flow_table(4).tensor().shape == (4, len(Row._fields))
    assert flow_table(4).times == (0.0, 0.25, 0.5, 0.75)


def test_unknown_solver_and_impossible_steps_are_named():
    levels = alphas_cumprod("linear", 10, 1e-4, 0.02)
    with pytest.raises(ValueError, match=r"'ddim'; a flow matching model takes euler, heun, dpmpp_2m"):
        flow_table(4, "ddim")
    with pytest.raises(ValueError, match=r"'euler'; a DDPM model takes"):
        ddpm_table(levels, 4, "euler")
    for steps in (0, -1):
        with pytest.raises(ValueError, match="wanted at least 1"):
            flow_table(steps)
    with pytest.raises(ValueError, match="11 sampling steps asked of a model trained with 10"):
        ddpm_table(levels, 11)
    with pytest.raises(ValueError, match="first without memory"):
        SamplingTable(solver="euler", steps=1, rows=(Row(0.0, 1.0, 1.0, c=1.0),))


def test_shift_above_one_spends_steps_near_the_noise():
    even, shifted = flow_table(8).times, flow_table(8, shift=3.0).times
    assert all(s < e for s, e in zip(shifted[1:], even[1:], strict=True))
    assert shifted[0] == 0.0
    sigma = 1 - even[3]
    assert 1 - shifted[3] == pytest.approx(3 * sigma / (1 + 2 * sigma))


# ---- guidance


@pytest.fixture
def condition():
    generator = torch.Generator().manual_seed(5)
    return Condition(
        tokens=torch.randn(2, 3, 8, generator=generator),
        pooled=torch.randn(2, 8, generator=generator),
        latent=torch.randn(2, 4, 6, 5, generator=generator),
    )


class Conditioned:
    """A network that adds up what it is told; remembers the batches it was asked for."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, condition):
        self.batches.append(len(x))
        told = condition.tokens.mean((1, 2)) + condition.pooled.mean(1) + t
        return torch.tanh(x + condition.latent + told.reshape(-1, 1, 1, 1))


def test_guidance_moves_away_from_the_unconditioned_answer(condition):
    x, t, network = torch.randn(2, 4, 6, 5), torch.tensor([0.2, 0.7]), Conditioned()
    given, blank = network(x, t, condition), network(x, t, condition.null())
    torch.testing.assert_close(guide(network, condition, 2.5)(x, t), blank + 2.5 * (given - blank))
    torch.testing.assert_close(guide(network, condition, 0.0)(x, t), blank)
    assert network.batches == [2, 2, 4, 4]


def test_guidance_scale_one_is_one_call_of_the_plain_network(condition):
    x, t, network = torch.randn(2, 4, 6, 5), torch.tensor([0.2, 0.7]), Conditioned()
    assert torch.equal(guide(network, condition, 1.0)(x, t), network(x, t, condition))
    assert network.batches == [2, 2]


def test_guidance_in_half_precision_is_combined_in_float32(condition):
    x, t = torch.randn(2, 4, 6, 5), torch.tensor([0.2, 0.7])

    def half(x, t, condition):
        return Conditioned()(x, t, condition).bfloat16()

    given, blank = half(x, t, condition).float(), half(x, t, condition.null()).float()
    torch.testing.assert_close(guide(half, condition, 7.0)(x, t), blank + 7 * (given - blank))


def test_guidance_keeps_to_the_largest_batch(condition):
    x, t, network = torch.randn(2, 4, 6, 5), torch.tensor([0.2, 0.7]), Conditioned()
    torch.testing.assert_close(guide(network, condition, 3.0, max_batch=3)(x, t), guide(network, condition, 3.0)(x, t))
    assert network.batches == [2, 2, 4]


# ---- seeds


def test_noise_depends_on_the_images_seed_alone():
    together = seeded_noise([3, 11, 3], (4, 8, 8))
    assert torch.equal(together[0], together[2])
    assert torch.equal(together[1:2], seeded_noise([11], (4, 8, 8)))
    assert not torch.equal(together[0], together[1])


def test_every_bit_of_a_seed_counts():
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1]
    draws = seeded_noise(seeds, (64,))
    assert len({tuple(draw.tolist()) for draw in draws}) == len(seeds)
    assert (torch.corrcoef(draws) - torch.eye(len(seeds))).abs().max() < 0.5


def test_draws_of_one_seed_are_independent_of_each_other_and_of_other_seeds():
    draws = torch.cat([seeded_noise([0, 1], (4096,), draw=i) for i in range(4)])
    assert (torch.corrcoef(draws) - torch.eye(8)).abs().max() < 0.08


def test_noise_is_standard_normal():
    noise = seeded_noise(range(8), (4, 32, 32))
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert (noise.abs() > 2).float().mean().item() == pytest.approx(0.0455, abs=0.005)


def test_a_seed_means_the_same_noise_next_year():
    """If this fails, numpy changed its stream: old seeds no longer give old images. Say so in CHANGELOG."""
    assert seeded_noise([1234], (3,))[0].tolist() == pytest.approx([-0.54778987, -0.03795446, -0.29366705])


def test_seeded_noise_takes_a_dtype_and_an_empty_list():
    assert torch.equal(seeded_noise([5], (4, 2, 2), dtype=torch.bfloat16), seeded_noise([5], (4, 2, 2)).bfloat16())
    assert seeded_noise([], (4, 2, 2)).shape == (0, 4, 2, 2)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ValueError, match=f"seed is {seed}"):
        seeded_noise([0, seed], (4, 2, 2))
