"""From noise to target: every solver is a table of numbers, and one pure loop reads it.

At row i the network is asked once, f_i = f(x, time_i), and the row's constants say what becomes of x and of one memory m:

    x <- a x + b f + c m + d noise        (x, m on the right are those from before the row)
    m <- x + e f

One memory of this form holds all the history our solvers need, exactly:

    Euler         x + h f                              a = 1, b = h
    Heun          x + h/2 (f_0 + f_1)                  row 1 moves x by h f_0 and keeps m = x + h/2 f_0; row 2: m + h/2 f_1
    DDIM, DDPM    affine in x and f, plus d noise      no memory
    DPM-Solver++  affine in x, D_i, D_{i-1}            D is the clean estimate, an x moved along f: the memory, up to a factor

Why not a history of f alone: D_{i-1} contains x_{i-1}, which no finite number of earlier f gives back. Why m = x + e f and not D
itself: D = m / alpha is huge where alpha is small; m stays near unit size, and 1 / alpha goes into c.

c = 0 in rows that read no memory (the first row always), e = 0 in rows whose memory nobody reads. f is whatever the network
predicts, velocity or noise; only the table knows which. Constants are computed in float64 on the host, so the loop has no branch
on a tensor's value, can be unrolled (`rows`), and can read its constants from the device (`tensor`).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clipdit.backend import Condition
from clipdit.shapes import Latent, Time

Velocity = Callable[[Latent, Time], Latent]
"""(x, t) -> f: the network with its condition filled in."""

FlowSolver = Literal["euler", "heun", "dpmpp_2m"]
DDPMSolver = Literal["ddim", "ddpm", "dpmpp_2m"]
FLOW_SOLVERS: tuple[str, ...] = get_args(FlowSolver)
DDPM_SOLVERS: tuple[str, ...] = get_args(DDPMSolver)

LOWEST_HALF_LOG_SNR = -5.1
"""DDPM sampling starts at the noisiest step whose log(alpha / sigma) is at least this, as DPM-Solver's authors advise. The cosine
schedule ends at -9.9, where an error in the predicted noise comes back 20,000 times larger; the linear one ends at -5.06."""


class Row(NamedTuple):
    """One evaluation of the network and what follows from it."""

    time: float
    """Network time of the evaluation, [0, 1]: 0 is noise, 1 is target."""
    a: float
    """Factor of x."""
    b: float
    """Factor of the prediction f."""
    c: float = 0.0
    """Factor of the memory; 0: the row reads none."""
    d: float = 0.0
    """Standard deviation of fresh noise; 0: the row adds none."""
    e: float = 0.0
    """The memory kept is x + e f; 0: nobody reads it."""


@dataclass(frozen=True, kw_only=True)
class SamplingTable:
    """A solver, reduced to constants. Hashable, so it can key a cache of compiled loops."""

    solver: str
    steps: int
    """Steps of the solver. Heun asks the network twice in all but the last, the others once."""
    rows: tuple[Row, ...]
    """One row for each evaluation of the network."""

    def __post_init__(self) -> None:
        if not self.rows or self.rows[0].c:
            raise ValueError(f"a sampling table needs rows, the first without memory; got {self.rows[:1]}")
        for before, row in itertools.pairwise(self.rows):
            assert bool(before.e) == bool(row.c), "a memory is kept exactly where the next row reads it"

    @property
    def times(self) -> tuple[float, ...]:
        """The K times at which the network is evaluated."""
        return tuple(row.time for row in self.rows)

    @property
    def stochastic(self) -> bool:
        """Whether any row adds fresh noise."""
        return any(row.d for row in self.rows)

    def tensor(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Float[Tensor, "K 6"]:
        """The rows as one tensor, columns time, a, b, c, d, e."""
        return torch.tensor(self.rows, dtype=torch.float64).to(dtype).to(device)


def shift_time(t, shift: float):
    """t / (t + shift (1 - t)): shift > 1 moves times towards noise (0), < 1 towards the target, 1 leaves them; 0 and 1 stay.

    Works on floats and tensors. Esser et al. 2024 (Stable Diffusion 3), eq. 23, written for t = 0 at the noise; diffusers'
    schedulers have the same formula for sigma = 1 - t: shift sigma / (1 + (shift - 1) sigma).
    """
    return t / (t + shift * (1 - t))


def flow_table(steps: int, solver: str = "euler", *, shift: float = 1.0) -> SamplingTable:
    """Flow matching, f = velocity: `steps` equal steps from t = 0 to t = 1, shifted.

    euler, heun: the sigmas that diffusers' Flux pipeline hands its scheduler, 1 - i / steps. (The schedulers' own default is
    linspace(1, 0.001, steps), which spends the last step on nothing.) Heun's last step is an Euler step, as in diffusers:
    training hardly ever visits t = 1.
    dpmpp_2m: starts at t = 0.001, shifted, as diffusers' DPMSolverMultistepScheduler(use_flow_sigmas=True) does, for log(alpha)
    must exist.
    ValueError for fewer than one step or an unknown solver.
    """
    _check(steps, solver, FLOW_SOLVERS, "flow matching")
    first = 1e-3 if solver == "dpmpp_2m" else 0.0
    grid = [shift_time(1 - (1 - first) * (1 - i / steps), shift) for i in range(steps)] + [1.0]
    if solver == "heun":
        return SamplingTable(solver=solver, steps=steps, rows=_heun_rows(grid))
    if solver == "euler":
        rows = tuple(Row(now, 1.0, then - now) for now, then in itertools.pairwise(grid))
        return SamplingTable(solver=solver, steps=steps, rows=rows)
    sigmas = [1 - t for t in grid]
    # the clean estimate is x + sigma f, the memory itself
    rows = _dpmpp_2m_rows(grid[:-1], alphas=grid, sigmas=sigmas, along=sigmas, scales=[1.0] * steps)
    return SamplingTable(solver=solver, steps=steps, rows=rows)


def ddpm_table(alphas_cumprod: Float[Tensor, "T"], steps: int, solver: str = "ddim") -> SamplingTable:
    """DDPM, f = predicted noise: `steps` of the T training steps, "trailing" (Lin et al. 2023, tab. 2), from the noisiest on.

    ddim: eta = 0 (Song et al. 2021, eq. 12). ddpm: the ancestral sampler, which is DDIM with eta = 1 and diffusers'
    variance_type "fixed_small". dpmpp_2m: DPM-Solver++(2M), midpoint (Lu et al. 2022, alg. 2), last step of first order.
    ValueError for steps outside 1 ... T or an unknown solver.
    """
    _check(steps, solver, DDPM_SOLVERS, "DDPM")
    chain = alphas_cumprod.double().tolist()
    total = len(chain)
    if steps > total:
        raise ValueError(f"{steps} sampling steps asked of a model trained with {total}; use at most {total}")
    start = max(n for n in range(total) if n == 0 or 0.5 * math.log(chain[n] / (1 - chain[n])) >= LOWEST_HALF_LOG_SNR)
    if steps > start + 1:
        raise ValueError(
            f"{steps} sampling steps asked; this noise schedule has {start + 1} usable ones. Use at most {start + 1}"
        )
    indices = [round((start + 1) * (steps - i) / steps) - 1 for i in range(steps)]
    times = [(total - 1 - n) / total for n in indices]  # clipdit.diffusion.time_of_step
    squares = [chain[n] for n in indices] + [1.0]
    alphas, sigmas = [math.sqrt(s) for s in squares], [math.sqrt(1 - s) for s in squares]
    if solver == "dpmpp_2m":
        # alpha times the clean estimate is x - sigma f, the memory
        rows = _dpmpp_2m_rows(times, alphas=alphas, sigmas=sigmas, along=[-s for s in sigmas], scales=alphas)
    else:
        rows = _ddim_rows(times, alphas=alphas, sigmas=sigmas, eta=1.0 if solver == "ddpm" else 0.0)
    return SamplingTable(solver=solver, steps=steps, rows=rows)


def advance(x: Latent, f: Latent, row: Row, memory: Latent | None = None, noise: Latent | None = None) -> Latent:
    """x after one row. Pass `memory` where c is not 0, `noise` where d is not; the memory left is (old x) + row.e f.

    `row` holds floats, or 0-d tensors on the device of x (a row of `SamplingTable.tensor`); then nothing here asks their values.
    """
    x = row.a * x + row.b * f
    if memory is not None:
        x = x + row.c * memory
    if noise is not None:
        x = x + row.d * noise
    return x


def sample(
    velocity: Velocity,
    noise: Latent,
    table: SamplingTable,
    *,
    step_noise: Callable[[int], Latent] | None = None,
    on_step: Callable[[int, Latent], None] | None = None,
) -> Latent:
    """Carry `noise` (B, C, h, w) to a target latent of the same shape and dtype.

    `velocity` gets x in the dtype of `noise` and t (B,) in float32; x itself is carried in at least float32, since in bfloat16
    twenty small steps lose most of their bits. `step_noise(i)` gives the fresh noise of row i, for stochastic tables;
    `on_step(i, x)` is called after each row. ValueError if a stochastic table is given no `step_noise`.
    """
    if table.stochastic and step_noise is None:
        raise ValueError(f"solver {table.solver} adds fresh noise at every step; pass step_noise, or use a deterministic solver")
    dtype = torch.promote_types(noise.dtype, torch.float32)
    times = table.tensor(noise.device, dtype)[:, 0]  # (K,) one upload, before the loop
    x, memory = noise.to(dtype), None
    for i, row in enumerate(table.rows):
        f = velocity(x.to(noise.dtype), times[i].expand(x.shape[0])).to(dtype)
        fresh = step_noise(i).to(dtype) if step_noise is not None and row.d else None
        x, memory = (
            advance(x, f, row, memory if row.c else None, fresh),
            x + row.e * f if row.e else None,
        )
        if on_step is not None:
            on_step(i, x)
    return x.to(noise.dtype)


def guide(
    velocity: Callable[[Latent, Time, Condition], Latent], condition: Condition, scale: float, *, max_batch: int | None = None
) -> Velocity:
    """Classifier-free guidance (Ho & Salimans 2022): null + scale (conditioned - null), for velocity and noise prediction alike.

    scale 1 is the plain conditioned network, one call of batch B. Otherwise both answers come from one call of batch 2 B, or from
    two calls of B where `max_batch` (Limits.max_batch) forbids that.
    """
    if scale == 1.0:
        return lambda x, t: velocity(x, t, condition)
    null = condition.null()
    # once, not in every step
    both = type(condition)(**{f.name: torch.cat([getattr(condition, f.name), getattr(null, f.name)]) for f in fields(condition)})

    def guided(x: Latent, t: Time) -> Latent:
        if max_batch is not None and 2 * x.shape[0] > max_batch:
            given, blank = velocity(x, t, condition), velocity(x, t, null)
        else:
            # not by chunk, which would tie an exported graph to the batch it was traced with
            given, blank = velocity(torch.cat([x, x]), torch.cat([t, t]), both).unflatten(0, (2, x.shape[0]))
        # a difference of near equals, enlarged: not in half precision
        given, blank = (f.to(torch.promote_types(f.dtype, torch.float32)) for f in (given, blank))
        return blank + scale * (given - blank)

    return guided


def seeded_noise(
    seeds: Sequence[int],
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    draw: int = 0,
) -> Float[Tensor, "B ..."]:
    """Gaussian noise (len(seeds), *shape); image i depends on seed i alone, so it is the same in any batch and on any device.

    `shape` is one image's (C, h, w). Seeds are integers from 0 to 2**63 - 1. `draw` 0 is the start; for stochastic solvers
    `step_noise=lambda i: seeded_noise(seeds, shape, device, dtype, draw=i + 1)`. Drawn with numpy because torch's CPU generator
    looks at the lower 32 bits of a seed only. ValueError for a seed out of range.
    """
    images = []
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}; wanted an integer from 0 to 2**63 - 1")
        bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(draw,)))
        images.append(torch.from_numpy(np.random.Generator(bits).standard_normal(shape, dtype=np.float32)))
    return torch.stack(images).to(dtype).to(device) if images else torch.empty((0, *shape), device=device, dtype=dtype)


def _check(steps: int, solver: str, known: tuple[str, ...], kind: str) -> None:
    if steps < 1:
        raise ValueError(f"sampling steps is {steps}; wanted at least 1")
    if solver not in known:
        raise ValueError(f"solver is {solver!r}; a {kind} model takes {', '.join(known)}")


def _heun_rows(grid: Sequence[float]) -> tuple[Row, ...]:
    """Heun's method over the times `grid`; a step is a predictor row and a corrector row, the last step one Euler row."""
    rows = []
    for now, then in itertools.pairwise(grid[:-1]):
        h = then - now
        rows += [Row(now, 1.0, h, e=h / 2), Row(then, 0.0, h / 2, c=1.0)]
    return (*rows, Row(grid[-2], 1.0, grid[-1] - grid[-2]))


def _ddim_rows(times: Sequence[float], *, alphas: Sequence[float], sigmas: Sequence[float], eta: float) -> tuple[Row, ...]:
    """DDIM (Song et al. 2021, eq. 12 and 16). `alphas`, `sigmas` have one entry more than `times`: the final 1 and 0."""
    rows = []
    for i, time in enumerate(times):
        alpha, sigma, next_alpha, next_sigma = alphas[i], sigmas[i], alphas[i + 1], sigmas[i + 1]
        std = eta * next_sigma / sigma * math.sqrt(1 - (alpha / next_alpha) ** 2)
        # x' = alpha' D + direction f + std noise, with D = (x - sigma f) / alpha
        direction = math.sqrt(next_sigma**2 - std**2)
        rows.append(Row(time, next_alpha / alpha, direction - next_alpha * sigma / alpha, d=std))
    return tuple(rows)


def _dpmpp_2m_rows(
    times: Sequence[float],
    *,
    alphas: Sequence[float],
    sigmas: Sequence[float],
    along: Sequence[float],
    scales: Sequence[float],
) -> tuple[Row, ...]:
    """DPM-Solver++(2M), midpoint, for any network whose clean estimate is D_i = (x + along_i f) / scales_i.

    With lambda = log(alpha / sigma), h = lambda' - lambda, r = (previous h) / h and k = alpha' (1 - exp(-h)):
    x' = sigma' / sigma x + k [(1 + 1 / 2r) D_i - 1 / 2r D_{i-1}]. The first step and the last (sigma' = 0) have no 1 / 2r term.
    `alphas`, `sigmas` have one entry more than `times`: the final 1 and 0.
    """
    last = len(times) - 1
    lambdas = [math.log(alpha / sigma) for alpha, sigma in zip(alphas[:-1], sigmas[:-1], strict=True)]
    rows = []
    for i, time in enumerate(times):
        shrink = sigmas[i + 1] / sigmas[i]
        k = alphas[i + 1] - alphas[i] * shrink  # alpha' (1 - exp(-h)), without the infinite h of sigma' = 0
        correct = 0 < i < last
        half_r = 0.5 * (lambdas[i + 1] - lambdas[i]) / (lambdas[i] - lambdas[i - 1]) if correct else 0.0  # 1 / 2r
        gain = k * (1 + half_r) / scales[i]
        rows.append(
            Row(
                time,
                shrink + gain,
                gain * along[i],
                c=-k * half_r / scales[i - 1] if correct else 0.0,
                e=along[i] if i + 1 < last else 0.0,  # read by the next row, if that is a corrected one
            )
        )
    return tuple(rows)
