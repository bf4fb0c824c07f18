"""How fast our training is: against a plain loop over diffusers' DiTTransformer2DModel, on equal terms.

Equal are: width, depth, heads, patch, MLP ratio, the source latent on the input, the cached latents that are read, batch size,
precision, optimiser, clipping, moving average. Each side is a process of its own, so that its peak memory is its own; they take
turns of a few seconds, so that a busy moment of the machine falls on both, and only one works at a time. Ours is the real loop of
clipdit.train.loop, paced from outside.
"""

import contextlib
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from diffusers.training_utils import EMAModel

from clipdit.backend import locate
from clipdit.data.augment import Augment
from clipdit.data.cache import LatentCache, build_cache
from clipdit.data.layouts import Pair
from clipdit.experiment import TranslationExperiment
from clipdit.measuring import Spread, synchronize
from clipdit.model.autoencoder import Autoencoder, load_vae
from clipdit.model.clip import ClipImageEncoder, load_clip
from clipdit.provenance import provenance
from clipdit.train.loop import resolve_precision, train
from clipdit.train.runs import translation_task
from clipdit.train.task import Batch, Task
from clipdit.train.translation import LossSettings

WARM_UP_STEPS = 3
"""Untimed, at the start of each side: allocations, compilation, the first look at the data."""

OURS, PLAIN = "clipdit", "diffusers DiTTransformer2DModel, plain loop"

GOAL = 1.3
"""How many times the images per second of the plain loop we want."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one side reports of one turn."""

    steps: int
    seconds: float
    loading_s: float
    """Of these, waiting for the batch: reading the cache, drawing noise."""
    peak_memory_mib: float
    """Of the process so far: resident memory on a CPU, allocated memory on an accelerator."""
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Side:
    """What was measured of one side."""

    parameters_million: float
    images_per_s: Spread
    step_ms: Spread
    loading_share: Spread
    """Of the step, 0 to 1."""
    peak_memory_mib: float
    memory_before_mib: float
    """Before the network was made: libraries, mostly. Of the peak."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a side is told."""

    experiment: TranslationExperiment
    pairs: list[Pair]
    cache: Path
    """Folder of a LatentCache, for the plain side."""
    threads: int


class Enough(Exception):
    """The measurement is over."""


class Pace:
    """One side's end of the pipe: says when to go on, and reports turns."""

    def __init__(self, connection: Connection, device: torch.device, parameters: int) -> None:
        self._connection, self._device, self._parameters = connection, device, parameters
        self._left = self._steps = 0
        self._began = self.loading_s = 0.0

    def before_step(self) -> None:
        """Wait for the turn if it is another's. Raises Enough at the end."""
        if not self._left:
            if self._steps:
                synchronize(self._device)
                seconds = time.perf_counter() - self._began
                self._connection.send(
                    Turn(
                        steps=self._steps,
                        seconds=seconds,
                        loading_s=self.loading_s,
                        peak_memory_mib=peak_memory_mib(self._device),
                        parameters=self._parameters,
                    )
                )
            self._left = self._steps = self._connection.recv()
            if not self._steps:
                raise Enough
            self.loading_s, self._began = 0.0, time.perf_counter()
        self._left -= 1


class PacedTask:
    """A task whose batches come when it is its turn; it saves nothing."""

    def __init__(self, task: Task, pace: Pace) -> None:
        self.task, self.pace = task, pace
        self.module, self.weights, self.contested = task.module, task.weights, task.contested

    def draw(self, step: int) -> Batch:
        self.pace.before_step()
        began = time.perf_counter()
        batch = self.task.draw(step)
        self.pace.loading_s += time.perf_counter() - began
        return batch

    def save(self, folder: Path) -> None: ...

    def sheet(self, path: Path) -> None: ...


def our_side(connection: Connection, plan: Plan) -> None:
    """Body of the process that trains with our loop."""
    torch.set_num_threads(plan.threads)
    with tempfile.TemporaryDirectory() as folder:
        device, out = _device(), Path(folder) / "run"
        connection.send(peak_memory_mib(device))
        task = translation_task(plan.experiment, plan.pairs, plan.pairs[:1], out)
        settings = replace(plan.experiment.train, steps=10**9, log_every=50, save_every=10**9, sheet_every=10**9)
        pace = Pace(connection, device, sum(p.numel() for p in task.module.parameters() if p.requires_grad))
        try:
            train(PacedTask(task, pace), settings, out, experiment={})
        except Enough:
            return


def plain_side(connection: Connection, plan: Plan) -> None:
    """Body of the process that trains diffusers' DiT with a loop as one writes it first: library defaults, nothing fused."""
    torch.set_num_threads(plan.threads)
    device, settings, size = _device(), plan.experiment.train, plan.experiment.model
    cache, random = LatentCache(plan.cache), np.random.default_rng(settings.seed)
    channels, cells, _ = cache.rows(np.array([0]))["target"].shape[1:]
    connection.send(peak_memory_mib(device))
    model = DiTTransformer2DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.width // size.heads,
        in_channels=2 * channels,  # the source latent beside the noisy one
        out_channels=channels,
        num_layers=size.depth,
        patch_size=size.patch,
        sample_size=cells,
        num_embeds_ada_norm=1,  # one class: there are none
    )
    model.to(device)  # pyright: ignore[reportArgumentType]  (diffusers wraps it untyped)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    ema = EMAModel(model.parameters(), decay=settings.ema_decay)
    bf16 = resolve_precision(settings.precision, device) == "bf16"
    pace = Pace(connection, device, sum(p.numel() for p in model.parameters()))
    model.train()
    while True:
        try:
            pace.before_step()
        except Enough:
            return
        began = time.perf_counter()
        batch = cache.rows(random.integers(cache.pairs * cache.views, size=settings.batch_size))
        target, source = batch["target"].to(device), batch["source"].to(device)
        noise, t = torch.randn_like(target), torch.rand(len(target), device=device)
        pace.loading_s += time.perf_counter() - began
        x = t[:, None, None, None] * target + (1 - t[:, None, None, None]) * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            labels = torch.zeros(len(target), dtype=torch.long, device=device)
            prediction = model(torch.cat([x, source], dim=1), timestep=1000 * t, class_labels=labels).sample
        loss = (prediction.float() - (target - noise)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())


def measure(experiment: TranslationExperiment, pairs: Sequence[Pair], *, seconds: float, rounds: int = 8) -> dict[str, object]:
    """Measure the caching, our loop, diffusers' and the experiment as it is.

    Args:
        experiment: gives the sizes, the VAE and CLIP, and the training settings. Its pixel losses, augmentation and compilation
            are left out, as the plain loop has none; the side "as it is" keeps its model.
        pairs: to cache and train on.
        seconds: for all turns together. `rounds`: turns of each side.

    Returns:
        What bench.json holds: settings, caching, sides by name, `speedup` (of ours over diffusers', by round) and its goal.
    """
    experiment = replace(
        experiment,
        loss=LossSettings(),
        pairs=replace(experiment.pairs, augment=Augment(views=1)),
        train=replace(experiment.train, compile=False, gradient_checkpointing=False, accumulate=1),
    )
    equal = replace(experiment, clip=None, model=replace(experiment.model, conditioning="concat", mlp_ratio=4.0))
    with tempfile.TemporaryDirectory() as folder:
        experiment, equal = (replace(e, pairs=replace(e.pairs, cache=Path(folder))) for e in (experiment, equal))
        caching, _ = _cache(experiment, pairs)
        _, plain_cache = _cache(equal, pairs)
        bodies = {
            OURS: (our_side, equal),
            PLAIN: (plain_side, equal),
            f"clipdit, with conditioning {experiment.model.conditioning} and MLP ratio {experiment.model.mlp_ratio:g}": (
                our_side,
                experiment,
            ),
        }
        plans = {
            name: (body, Plan(experiment=e, pairs=list(pairs), cache=plain_cache, threads=torch.get_num_threads()))
            for name, (body, e) in bodies.items()
        }
        with Sides(plans) as sides:
            turns = sides.in_turns(seconds, rounds)
            measured = {
                name: _side(of_side, sides.memory_before_mib[name], experiment.train.batch_size)
                for name, of_side in turns.items()
            }
    return {
        "provenance": provenance(),
        "settings": {
            **asdict(replace(experiment.model, conditioning="concat", mlp_ratio=4.0)),
            "batch_size": experiment.train.batch_size,
            "precision": "bf16" if resolve_precision(experiment.train.precision, _device()) == "bf16" else "fp32",
            "device": str(_device()),
        },
        "caching": caching,
        "sides": {name: asdict(side) for name, side in measured.items()},
        "speedup": asdict(Spread.of(_speed(a) / _speed(b) for a, b in zip(turns[OURS], turns[PLAIN], strict=True))),
        "goal": GOAL,
    }


class Sides:
    """The processes, one for each side. Inside the `with` they wait for their turns; after it they are gone."""

    def __init__(self, plans: dict[str, tuple[Callable[[Connection, Plan], None], Plan]]) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process would inherit our memory, and CUDA does not survive it
        self._ends: dict[str, Connection] = {}
        self._processes = []
        self.memory_before_mib: dict[str, float] = {}
        for name, (body, plan) in plans.items():
            self._ends[name], theirs = context.Pipe()  # pyright: ignore[reportArgumentType]  (typed as Windows' on every system)
            process = context.Process(target=body, args=(theirs, plan), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)

    def __enter__(self) -> "Sides":
        for name in self._ends:
            self.memory_before_mib[name] = self._answer(name)
        return self

    def __exit__(self, *_) -> None:
        for end in self._ends.values():
            with contextlib.suppress(BrokenPipeError):
                end.send(0)
        for process in self._processes:
            process.join(timeout=30)
            process.terminate()

    def in_turns(self, seconds: float, rounds: int) -> dict[str, list[Turn]]:
        """Warm up, then let each side work `rounds` times, `seconds` in all."""
        speeds = {name: _speed(self._turn(name, WARM_UP_STEPS)) for name in self._ends}
        share_s = seconds / (rounds * len(speeds))
        steps = {name: max(1, round(share_s * speed)) for name, speed in speeds.items()}
        turns: dict[str, list[Turn]] = {name: [] for name in self._ends}
        for number in range(rounds):
            # forwards and backwards, so that nobody always goes first
            for name in list(steps) if number % 2 else reversed(steps):
                turns[name].append(self._turn(name, steps[name]))
        return turns

    def _turn(self, name: str, steps: int) -> Turn:
        self._ends[name].send(steps)
        return self._answer(name)

    def _answer(self, name: str):
        try:
            return self._ends[name].recv()
        except EOFError:
            raise RuntimeError(f"the side {name!r} stopped; its own message is above") from None


def peak_memory_mib(device: torch.device) -> float:
    """The most this process has held so far: on an accelerator what torch allocated there, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage there: its peak includes that of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _cache(experiment: TranslationExperiment, pairs: Sequence[Pair]) -> tuple[dict[str, object], Path]:
    """Build the cache that this experiment reads: how fast that went, and where it is."""
    device = _device()
    autoencoder = Autoencoder(load_vae(locate(experiment.vae)).eval()).to(device)
    clip = ClipImageEncoder(load_clip(locate(experiment.clip)).eval()).to(device) if experiment.clip else None
    size = (experiment.pairs.size, experiment.pairs.size)
    began = time.perf_counter()
    assert experiment.pairs.cache is not None
    cache = build_cache(experiment.pairs.cache, pairs, autoencoder, clip, experiment.pairs.augment, size=size)
    seconds = time.perf_counter() - began
    return {
        "pairs": len(pairs),
        "seconds": seconds,
        "pairs_per_s": len(pairs) / seconds,
        "mib": cache.bytes / 2**20,
    }, cache.folder


def _side(turns: Sequence[Turn], memory_before_mib: float, batch_size: int) -> Side:
    return Side(
        parameters_million=turns[0].parameters / 1e6,
        images_per_s=Spread.of(batch_size * _speed(turn) for turn in turns),
        step_ms=Spread.of(1000 / _speed(turn) for turn in turns),
        loading_share=Spread.of(turn.loading_s / turn.seconds for turn in turns),
        peak_memory_mib=turns[-1].peak_memory_mib,
        memory_before_mib=memory_before_mib,
    )


def _speed(turn: Turn) -> float:
    """Steps per second."""
    return turn.steps / turn.seconds


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
