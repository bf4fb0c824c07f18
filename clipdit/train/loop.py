"""The training loop: one, top to bottom, for every task. Draw the step's batch, sum its losses, step, average, log, save.

A run folder holds the checkpoint (the task writes it, with averaged weights), training_state.safetensors to go on from,
history.jsonl, TensorBoard events, loss_curve.png and samples/. Every file is replaced atomically, so a kill or a full disk leaves
the last good one. On several processes (`torchrun`) each takes its share of the same batch, and the first one writes.
"""

import contextlib
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from clipdit.files import clear_leftovers
from clipdit.train.guard import Interrupt, Interval, alone_in, check_plan, check_same_experiment, check_sane
from clipdit.train.order import rank_slice
from clipdit.train.processes import agreed, on_main, processes
from clipdit.train.record import Record
from clipdit.train.state import Progress, load_state, read_progress, save_state
from clipdit.train.task import Losses, Task

logger = logging.getLogger(__name__)

LOOK_EVERY = 10
"""Steps after which several processes ask one another whether to stop: each time they wait for their GPUs."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long, how fast and how carefully to train."""

    steps: int = 20_000
    """Optimiser steps of the whole run."""
    batch_size: int = 64
    """Images in a step, over all processes and accumulated parts."""
    accumulate: int = 1
    """Parts in which each process takes its share, to save memory."""
    lr: float = 5e-4
    """Peak learning rate of AdamW."""
    warmup_steps: int = 200
    """Steps over which the rate rises linearly from zero."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """What the rate does after warm-up: stays, falls to a tenth at the last step, or stays for half of the run and then falls to
    zero, as with Pix2PixHD."""
    weight_decay: float = 0.01
    """Of weight matrices; vectors (biases, norms, tables) are never decayed."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; larger ones are scaled down."""
    ema_decay: float = 0.999
    """Of the averaged weights that the checkpoint holds; it warms up as (1 + n) / (10 + n)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the forward pass; auto is bf16 where the hardware multiplies it (CUDA sm80, AMX, AVX512-BF16 or later), else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the network: minutes at the start, then faster steps."""
    fused: bool = False
    """Fused Triton kernels for the operations that have gradients; on NVIDIA GPUs, see docs/kernels.md."""
    seed: int = 0
    """Of the order of examples, all noise, and the initial weights."""
    log_every: int = 20
    """Steps averaged in one row of the history."""
    save_every: int = 500
    """Steps between checkpoints."""
    sheet_every: int = 1000
    """Steps between sample sheets."""
    divergence: float = 10.0
    """Stop when the mean loss of a logging interval exceeds this many times the lowest one."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "sheet_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; wanted at least 1")
        for name in ("warmup_steps", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} is {getattr(self, name)}; wanted 0 or more")
        if self.batch_size % self.accumulate:
            raise ValueError(f"train.batch_size {self.batch_size} does not divide into {self.accumulate} parts; change one")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay is {self.ema_decay}; wanted a number in [0, 1)")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas are {self.betas}; wanted two numbers in [0, 1)")
        for name in ("lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} is {getattr(self, name)}; wanted a finite number above 0")
        if not self.divergence > 1:
            raise ValueError(f"train.divergence is {self.divergence}; wanted a number above 1")


def resolve_precision(precision: str, device: torch.device) -> Literal["bf16", "no"]:
    """What "auto" means on this device, in accelerate's words."""
    if precision == "auto":
        cuda = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
        cpu = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
        precision = "bf16" if cuda or cpu else "fp32"
    return "bf16" if precision == "bf16" else "no"


def learning_rate(settings: TrainSettings, step: int, spent: float = 0.0) -> float:
    """The rate of the optimiser step number `step`, from 0; `spent` is the share of the minutes used, where they are limited."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    done = max(spent, (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps))
    if settings.schedule == "linear":
        return settings.lr * min(1.0, max(0.0, 2 * (1 - done)))
    return settings.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def make_optimizer(task: Task, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over what the task trains; weight matrices decay, vectors do not."""
    trained = [(n, p) for n, p in task.module.named_parameters() if p.requires_grad]
    matrices = [p for _, p in trained if p.ndim > 1]
    vectors = [p for _, p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, fused=True)


def _total(losses: Losses, weights: dict[str, float]) -> Tensor:
    return torch.stack([factor * losses[name].float().mean() for name, factor in weights.items() if name in losses]).sum()


def train(
    task: Task,
    settings: TrainSettings,
    out: Path,
    *,
    experiment: dict,
    resume: bool = False,
    minutes: float | None = None,
    on_save: Callable[[Progress], object] | None = None,
) -> Progress:
    """Train until `settings.steps`, or until `minutes` of training (over all resumptions) are spent.

    `experiment` is the resolved configuration, kept in the state: resuming with another one is refused. The first process calls
    `on_save` at the start and after each save. Ctrl-C saves and raises KeyboardInterrupt. Raises ValueError when the run cannot
    be resumed or another process trains into `out`, Diverged when the loss is no longer a sensible number, OSError when the disk
    takes no more; the last save stays whole in each case.
    """
    check_plan(settings, minutes, processes().num_processes)
    if resume:
        check_same_experiment(read_progress(out).experiment, experiment)
    device = cast(torch.device, processes().device)
    AcceleratorState._reset_state()  # else a second training in one process could not have another precision
    accelerator = Accelerator(mixed_precision=resolve_precision(settings.precision, device))
    world, rank, main = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process
    optimizer = inner = make_optimizer(task, settings)
    task.module.to(device)
    trained = [(n, p) for n, p in task.module.named_parameters() if p.requires_grad]
    parameters = [p for _, p in trained]
    ema = EMAModel(parameters, decay=settings.ema_decay, foreach=True)
    ema.to(device)
    progress = Progress(experiment=json.dumps(experiment, sort_keys=True))
    if resume:
        progress = replace(load_state(out, trained, ema.shadow_params, optimizer), experiment=progress.experiment)
        ema.optimization_step = progress.step
    module, optimizer = accelerator.prepare(task.module, optimizer)
    forward = torch.compile(module) if settings.compile else module
    record: Record | None = None

    @contextlib.contextmanager
    def averaged() -> Iterator[None]:
        """The network with its averaged weights."""
        ema.store(parameters)
        ema.copy_to(parameters)
        task.module.eval()
        try:
            yield
        finally:
            task.module.train()
            ema.restore(parameters)

    def begin() -> None:
        nonlocal record
        stack.enter_context(alone_in(out))
        clear_leftovers(out)
        if not resume:  # now, so that a kill before the first regular save can be resumed too
            save_state(out, trained, ema.shadow_params, inner, progress)
        record = Record(out, step=progress.step)
        stack.callback(record.close)
        with averaged():  # on resuming too: the kill may have come after the state was saved and before the checkpoint was
            task.save(out)
        if on_save is not None:
            on_save(progress)

    def write(progress: Progress, row: dict[str, float] | None, saves: bool, draws: bool) -> None:
        assert record is not None
        if row is not None:
            record.add({"step": progress.step, **row})
        if saves:
            save_state(out, trained, ema.shadow_params, inner, progress)
            with averaged():
                task.save(out)
            record.plot()
            if on_save is not None:
                on_save(progress)
        if draws:
            with averaged():
                task.sheet(out / "samples" / f"step-{progress.step:06d}.png")

    if main:
        precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
        count = sum(p.numel() for p in parameters) / 1e6
        logger.info("training %.2f M parameters on %s, %d process(es), %s", count, device, world, precision)
    budget_s = 60 * minutes if minutes is not None else math.inf
    share, asked = progress.seconds / budget_s, 0.0
    with contextlib.ExitStack() as stack:
        interrupted = stack.enter_context(Interrupt())
        on_main(begin)
        bar = stack.enter_context(
            tqdm(total=settings.steps, initial=progress.step, disable=None if main else True, unit="step", desc="training")
        )
        task.module.train()
        saved, resumed_at, clock = progress.step, progress, time.monotonic()
        interval, last_line = Interval(), clock
        while progress.step < settings.steps and share < 1 and not asked:
            step = progress.step
            began = time.monotonic()
            batch = rank_slice(task.draw(step), rank, world)
            interval.loading_s += time.monotonic() - began
            rate = learning_rate(settings, step, share)
            for group in optimizer.param_groups:
                group["lr"] = rate
            for part in range(settings.accumulate):
                piece = rank_slice(batch, part, settings.accumulate)
                piece = {k: v.to(device, non_blocking=True) for k, v in piece.items()}
                last = part + 1 == settings.accumulate
                with contextlib.nullcontext() if last else accelerator.no_sync(module):
                    losses = forward(piece)
                    accelerator.backward(_total(losses, task.weights) / settings.accumulate)
                told = {name: value.detach() for name, value in losses.items() if name not in task.contested}
                total = _total(told, task.weights)
                for name, value in {**losses, "total": total[None]}.items():
                    interval.add(name, value.detach().float().mean() / settings.accumulate)
            interval.add("gradient_norm", cast(Tensor, accelerator.clip_grad_norm_(parameters, settings.clip_norm)).detach())
            interval.steps += 1
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.step(parameters)
            bar.update()

            now = time.monotonic()
            progress = replace(progress, step=step + 1, seconds=resumed_at.seconds + now - clock)
            ends = progress.step == settings.steps
            if world == 1 or ends or progress.step % LOOK_EVERY == 0:
                # every process must stop and save at the same step, whoever was asked to
                share, asked = agreed(progress.seconds / budget_s, float(interrupted.asked))
            ends = ends or share >= 1
            saves = ends or asked > 0 or progress.step % settings.save_every == 0
            draws = not asked and (ends or progress.step % settings.sheet_every == 0)
            row = None
            if saves or progress.step % settings.log_every == 0:
                row = interval.means(accelerator)
                check_sane(row, progress, settings, saved=saved)
                progress = replace(progress, lowest_loss=min(progress.lowest_loss, row["loss/total"]))
                row |= {"lr": rate, "images_per_s": row.pop("steps_per_s") * settings.batch_size}
                loss, images_per_s = row["loss/total"], row["images_per_s"]
                bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{images_per_s:.0f}")
                if main and bar.disable and (now - last_line > 15 or ends):
                    logger.info("step %d/%d  loss %.4f  %.0f images/s", progress.step, settings.steps, loss, images_per_s)
                    last_line = now
                interval = Interval()
            if row is not None or draws:
                on_main(functools.partial(write, progress, row, saves, draws))
                saved = progress.step if saves else saved
    if asked:
        if main:
            logger.info("saved at step %d; --resume goes on from there", progress.step)
        raise KeyboardInterrupt
    return progress
