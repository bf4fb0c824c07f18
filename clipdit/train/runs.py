"""From a preset and a data folder to a run: reads the pairs, loads or makes the networks, lays out the run folder, trains."""

import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from clipdit.backend import builtin_checkpoint
from clipdit.data.cache import build_cache
from clipdit.data.layouts import Pair
from clipdit.data.pairs import find_pairs
from clipdit.data.pixels import read_pixels
from clipdit.experiment import (
    AutoencoderExperiment,
    ClipExperiment,
    Experiment,
    PairSettings,
    TranslationExperiment,
    to_json,
    write_experiment,
)
from clipdit.model.autoencoder import Autoencoder, load_vae
from clipdit.model.clip import ClipImageEncoder, load_clip
from clipdit.pipeline import ClipDiTPipeline, save_checkpoint
from clipdit.presets import BUILT_IN
from clipdit.train.autoencoder import AutoencoderTask
from clipdit.train.clip import ClipTask, read_captions
from clipdit.train.guard import check_same_experiment
from clipdit.train.loop import train
from clipdit.train.state import STATE_FILE, Progress, read_progress
from clipdit.train.task import Task
from clipdit.train.translation import Held, TranslationTask

logger = logging.getLogger(__name__)
SHEET_ROWS = 12


def run(
    experiment: Experiment, preset: str, data: Path, out: Path, *, resume: bool = False, minutes: float | None = None
) -> Progress:
    """Train `experiment` on the pairs in `data` into the folder `out`.

    ValueError when there is nothing to train on, `out` is taken, or the run cannot be resumed so.
    """
    plain = to_json(experiment, preset)
    if resume:
        check_same_experiment(read_progress(out).experiment, plain)  # before minutes of caching
    elif out.exists() and (not out.is_dir() or any(out.iterdir())) and not _only_cache(out):
        hint = "add --resume to go on, or give another folder" if (out / STATE_FILE).exists() else "give a new or empty folder"
        raise ValueError(f"{out} is there already; {hint}")
    found = find_pairs(data, direction=experiment.pairs.direction, read_pixels=True)
    for problem in found.problems[:5]:
        logger.warning("left out %s", problem)
    if len(found.problems) > 5:
        logger.warning("and %d more; `clipdit data check %s` lists them", len(found.problems) - 5, data)
    for note in found.notes:
        logger.info("%s", note)
    pairs, val = found.split("train"), found.split("val") or found.split("test") or found.split("train")
    if not pairs:
        raise ValueError(f"{data} holds no pairs to train on; `clipdit data check {data}` says what was found")
    logger.info("%d pairs to train on, %d held out for sample sheets (%s)", len(pairs), len(val), found.layout)
    match experiment:
        case TranslationExperiment():
            task = translation_task(experiment, pairs, val, out, resume)
        case AutoencoderExperiment():
            size = (experiment.pairs.size, experiment.pairs.size)
            task = AutoencoderTask(
                experiment.model,
                read_pixels(pairs, size),
                read_pixels(val[:6], size),
                experiment.train.batch_size,
                experiment.train.seed,
            )
        case ClipExperiment():
            task = _clip(experiment, pairs, val, data)
    if PartialState().is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        write_experiment(out, plain)
    return train(task, experiment.train, out, experiment=plain, resume=resume, minutes=minutes)


def _only_cache(out: Path) -> bool:
    return out.is_dir() and {p.name for p in out.iterdir()} <= {"cache"}


def _clip(experiment: ClipExperiment, pairs: Sequence[Pair], val: Sequence[Pair], data: Path) -> Task:
    size = (experiment.pairs.size, experiment.pairs.size)
    train, held = (read_pixels(p, size) for p in (pairs, val))
    captions, held_captions = (read_captions(data, p) for p in (pairs, val))
    return ClipTask(experiment.model, train, captions, held, held_captions, experiment.train.batch_size, experiment.train.seed)


def locate(part: str) -> str:
    """A VAE or CLIP as the user names it; "built-in" is the package's own."""
    if part != BUILT_IN:
        return part
    folder = builtin_checkpoint()
    if not (folder / "model_index.json").exists():
        raise ValueError("this installation has no built-in checkpoint; give --vae and --clip, by folder or hub id")
    return str(folder)


def check_size(settings: PairSettings, downscale: int, patch: int) -> None:
    """ValueError unless the size divides into the DiT's tokens."""
    if settings.size % (downscale * patch):
        raise ValueError(
            f"pairs.size is {settings.size}; wanted a multiple of {downscale * patch} ({downscale} pixels a cell, patch {patch})"
        )


def translation_task(experiment: TranslationExperiment, pairs: Sequence[Pair], val: Sequence[Pair], out: Path, resume: bool) -> Task:
    settings, model = experiment.train, experiment.model
    size = (experiment.pairs.size, experiment.pairs.size)
    vae = load_vae(locate(experiment.vae)).eval()
    bare = Autoencoder(vae)
    check_size(experiment.pairs, bare.downscale, model.patch)
    reads_clip = model.conditioning != "concat"
    if reads_clip and experiment.clip is None:
        raise ValueError(f'conditioning "{model.conditioning}" reads CLIP; give --clip, or --model.conditioning concat')
    wants_clip = reads_clip or experiment.loss.clip_similarity > 0
    encoder = load_clip(locate(experiment.clip)).eval() if wants_clip and experiment.clip else None
    clip = ClipImageEncoder(encoder) if encoder is not None else None

    state = PartialState(cpu=not torch.cuda.is_available())
    bare.to(state.device)
    if clip is not None:
        clip.to(state.device)
    with state.main_process_first():  # the others find the cache made
        cache = build_cache(
            experiment.pairs.cache or out / "cache",
            pairs,
            bare,
            clip if reads_clip else None,
            experiment.pairs.augment,
            size=size,
        )
    statistics = cache.statistics
    torch.manual_seed(settings.seed)
    dit = model.make(
        latent_channels=bare.latent_channels,
        clip_token_width=clip.token_width if clip is not None and reads_clip else 1,
        clip_embedding_width=clip.embedding_width if clip is not None and reads_clip else 1,
    )
    if settings.gradient_checkpointing:
        dit.enable_gradient_checkpointing()
    pipeline = ClipDiTPipeline(
        dit,
        vae,
        experiment.objective.to_scheduler(),
        encoder if reads_clip else None,
        latents_mean=statistics.mean,
        latents_std=statistics.std,
        image_size=size,
        default_steps=experiment.steps,
        default_guidance=experiment.guidance,
    )
    if state.is_main_process and not resume:
        _lay_out(pipeline, out)
    held = val[:SHEET_ROWS]
    return TranslationTask(
        dit,
        experiment.objective,
        experiment.loss,
        Autoencoder(vae, statistics.mean, statistics.std),
        clip,
        cache,
        Held(pixels=read_pixels(held, size), names=[pair.id for pair in held]),
        batch=settings.batch_size,
        seed=settings.seed,
        drop=experiment.drop_condition,
        steps=experiment.steps,
        guidance=experiment.guidance,
    )


def _lay_out(pipeline: ClipDiTPipeline, out: Path) -> None:
    """Write the whole checkpoint folder beside `out`, then move its parts in: a kill leaves no half of one.

    `model_index.json` comes last: until it is there the folder is no checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        save_checkpoint(pipeline, Path(temporary))
        for part in sorted(Path(temporary).iterdir(), key=lambda p: p.name == "model_index.json"):
            shutil.move(part, out / part.name)
