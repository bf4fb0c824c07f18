"""The training loop: one, top to bottom, for every task. Draw the step's batch, sum its losses, step, average, log, save.

A run folder holds the checkpoint (the task writes it, with averaged weights), training_state.safetensors to go on from,
history.jsonl, TensorBoard events, loss_curve.png and samples/. Every file is replaced atomically, so a kill or a full disk leaves
the last good one. On several processes (`torchrun`) each takes its share of the same batch, and the first one writes.
"""

import contextlib
import json
import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator, PartialState
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from clipdit.train.guard import Interrupt, Interval, agreed, check_same_experiment, check_sane
from clipdit.train.order import rank_slice
from clipdit.train.record import Record
from clipdit.train.state import Progress, clear_leftovers, load_state, read_progress, save_state
from clipdit.train.task import Losses, Task

logger = logging.getLogger(__name__)


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
    schedule: Literal["constant", "cosine"] = "cosine"
    """What the rate does after warm-up: stays, or falls to a tenth at the last step."""
    weight_decay: float = 0.01
    """Of weight matrices; vectors (biases, norms, tables) are never decayed."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; larger ones are scaled down."""
    ema_decay: float = 0.999
    """Of the averaged weights that the checkpoint holds; it warms up as (1 + n) / (10 + n)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the forward pass; auto is bf16 where the hardware multiplies it (CUDA sm80 and later, CPUs with AMX), else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the network: minutes at the start, then faster steps."""
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
        if self.batch_size % self.accumulate:
            raise ValueError(f"train.batch_size {self.batch_size} does not divide into {self.accumulate} parts; change one")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay is {self.ema_decay}; wanted a number in [0, 1)")
        for name in ("lr", "clip_norm", "divergence"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} is {getattr(self, name)}; wanted a finite number above 0")


def resolve_precision(precision: str, device: torch.device) -> Literal["bf16", "no"]:
    """What "auto" means on this device, in accelerate's words."""
    if precision == "auto":
        cuda = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
        amx = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
        precision = "bf16" if cuda or amx else "fp32"
    return "bf16" if precision == "bf16" else "no"


def learning_rate(settings: TrainSettings, step: int, spent: float = 0.0) -> float:
    """The rate of the optimiser step number `step`, from 0; `spent` is the share of the minutes used, where they are limited."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    done = max(spent, (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps))
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
) -> Progress:
    """Train until `settings.steps`, or until `minutes` of training (over all resumptions) are spent.

    `experiment` is the resolved configuration, kept in the state: resuming with another one is refused. Ctrl-C saves and raises
    KeyboardInterrupt. Raises ValueError when the run cannot be resumed, Diverged when the loss is no longer a sensible
    number; the checkpoint before that stays.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    accelerator = Accelerator(mixed_precision=resolve_precision(settings.precision, state.device))
    world, rank, main = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process
    if settings.batch_size % (world * settings.accumulate):
        raise ValueError(
            f"train.batch_size {settings.batch_size} does not divide among {world} processes x {settings.accumulate} parts"
        )
    fingerprint = json.dumps(experiment, sort_keys=True)
    optimizer = make_optimizer(task, settings)
    task.module.to(accelerator.device)
    trained = [(n, p) for n, p in task.module.named_parameters() if p.requires_grad]
    parameters = [p for _, p in trained]
    ema = EMAModel(parameters, decay=settings.ema_decay, foreach=True)
    ema.to(accelerator.device)
    progress = Progress(experiment=fingerprint)
    if resume:
        check_same_experiment(read_progress(out).experiment, experiment)
        progress = load_state(out, trained, ema.shadow_params, optimizer)
        ema.optimization_step = progress.step
    if main:
        out.mkdir(parents=True, exist_ok=True)
        clear_leftovers(out)
    inner = optimizer
    module, optimizer = accelerator.prepare(task.module, optimizer)
    forward = torch.compile(module) if settings.compile else module

    def save(progress: Progress) -> None:
        if not main:
            return
        ema.store(parameters)
        ema.copy_to(parameters)
        try:
            task.save(out)
        finally:
            ema.restore(parameters)
        save_state(out, trained, ema.shadow_params, inner, progress)

    def sheet(step: int) -> None:
        if not main:
            return
        ema.store(parameters)
        ema.copy_to(parameters)
        task.module.eval()
        try:
            task.sheet(out / "samples" / f"step-{step:06d}.png")
        finally:
            task.module.train()
            ema.restore(parameters)

    count = sum(p.numel() for p in parameters)
    logger.info(
        "training %.2f M parameters on %s, %s process(es), %s",
        count / 1e6,
        accelerator.device,
        world,
        "bf16" if accelerator.mixed_precision == "bf16" else "fp32",
    )
    record = Record(out, step=progress.step) if main else None
    interrupted = Interrupt()
    bar = tqdm(total=settings.steps, initial=progress.step, disable=None if main else True, unit="step", desc="training")
    task.module.train()
    clock, resumed_at = time.monotonic(), progress
    interval, last_line = Interval(), clock
    try:
        with interrupted:
            while progress.step < settings.steps:
                step = progress.step
                began = time.monotonic()
                batch = rank_slice(task.draw(step), rank, world)
                interval.loading_s += time.monotonic() - began
                share = agreed(accelerator, progress.seconds / (60 * minutes)) if minutes else 0.0
                rate = learning_rate(settings, step, share)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                for part in range(settings.accumulate):
                    piece = rank_slice(batch, part, settings.accumulate)
                    piece = {k: v.to(accelerator.device, non_blocking=True) for k, v in piece.items()}
                    last = part + 1 == settings.accumulate
                    with contextlib.nullcontext() if last else accelerator.no_sync(module):
                        losses = forward(piece)
                        total = _total(losses, task.weights)
                        accelerator.backward(total / settings.accumulate)
                    for name, value in {**losses, "total": total[None]}.items():
                        interval.add(name, value.detach().float().mean() / settings.accumulate)
                interval.add("gradient_norm", accelerator.clip_grad_norm_(parameters, settings.clip_norm).detach())
                interval.steps += 1
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                ema.step(parameters)
                bar.update()

                now = time.monotonic()
                progress = replace(progress, step=step + 1, seconds=resumed_at.seconds + now - clock)
                spent = minutes is not None and progress.seconds >= 60 * minutes
                # every process must stop and save at the same step, whoever was asked to
                ends = agreed(accelerator, float(spent or interrupted.asked)) > 0
                done = ends or progress.step == settings.steps
                saves = done or progress.step % settings.save_every == 0
                if saves or progress.step % settings.log_every == 0:
                    row = interval.means(accelerator)
                    check_sane(row, progress, settings)
                    progress = replace(progress, lowest_loss=min(progress.lowest_loss, row["loss/total"]))
                    row |= {"lr": rate, "images_per_s": row.pop("steps_per_s") * settings.batch_size}
                    if record:
                        record.add({"step": progress.step, **row})
                    bar.set_postfix(loss=f"{row['loss/total']:.4f}", images_per_s=f"{row['images_per_s']:.0f}")
                    if main and bar.disable and (now - last_line > 15 or done):
                        logger.info(
                            "step %d/%d  loss %.4f  %.0f images/s",
                            progress.step, settings.steps, row["loss/total"], row["images_per_s"],
                        )  # fmt: skip
                        last_line = now
                    interval = Interval()
                if record and (progress.step % settings.sheet_every == 0 or done):
                    sheet(progress.step)
                if saves:
                    save(progress)
                    if record:
                        record.plot()
                if done:
                    break
    finally:
        bar.close()
        if record:
            record.close()
    if interrupted.asked:
        raise KeyboardInterrupt
    return progress
