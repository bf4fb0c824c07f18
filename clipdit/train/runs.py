"""From a preset and a data folder to a run: reads the pairs, loads or makes the networks, trains, writes the model card."""

import copy
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import cast

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPVisionModelWithProjection

from clipdit.backend import locate
from clipdit.data.cache import LatentCache, Statistics, build_cache, fingerprint
from clipdit.data.layouts import Pair
from clipdit.data.pairs import PairSet, find_pairs
from clipdit.data.pixels import PixelStore, read_pixels
from clipdit.direct import Direct
from clipdit.experiment import (
    AdversarialExperiment,
    AutoencoderExperiment,
    ClipExperiment,
    DecoderExperiment,
    Experiment,
    PairSettings,
    StudentExperiment,
    TranslationExperiment,
    to_json,
    write_experiment,
)
from clipdit.files import write_atomically
from clipdit.flow import FlowMatching
from clipdit.images import to_float
from clipdit.losses import PerceptualLoss
from clipdit.model.autoencoder import VAE, Autoencoder, is_of_decoder, latent_correlation, load_vae
from clipdit.model.clip import ClipImageEncoder, load_clip
from clipdit.model.dit import DiT
from clipdit.model.network import Network
from clipdit.model.ops import Ops
from clipdit.model.pixels import Pixels
from clipdit.pipeline import ClipDiTPipeline, load_checkpoint
from clipdit.presets import PRESETS
from clipdit.torch_backend import EagerBackend
from clipdit.train import card
from clipdit.train.adversarial import AdversarialTask
from clipdit.train.autoencoder import AutoencoderTask
from clipdit.train.clip import ClipTask, read_captions
from clipdit.train.guard import check_plan, check_same_experiment
from clipdit.train.loop import resolve_precision, train
from clipdit.train.processes import from_main, main_first, processes
from clipdit.train.record import read_history
from clipdit.train.state import STATE_FILE, Progress, read_progress
from clipdit.train.student import Ends
from clipdit.train.translation import Held, TranslationTask

logger = logging.getLogger(__name__)
SHEET_ROWS = 12


def run(
    experiment: Experiment, preset: str, data: Path, out: Path, *, resume: bool = False, minutes: float | None = None
) -> Progress:
    """Train `experiment`, a variant of `preset`, on the pairs in `data` into the folder `out`.

    ValueError when there is nothing to train on, `out` is taken, or the run cannot be resumed so.
    """
    check_plan(experiment.train, minutes, processes().num_processes)  # this and the folder now, not after minutes of caching
    plain = to_json(experiment, preset)
    found = from_main(lambda: _find(experiment, plain, data, out, resume))
    pairs, val = found.split("train"), found.split("val") or found.split("test") or found.split("train")
    names = hashlib.sha256("\n".join(pair.id for pair in pairs).encode()).hexdigest()
    plain["data"] = {"layout": found.layout, "pairs": len(pairs), "pairs_sha256": names[:16]}
    size = (experiment.pairs.size, experiment.pairs.size)
    batch, seed = experiment.train.batch_size, experiment.train.seed
    if experiment.train.fused and not isinstance(experiment, TranslationExperiment | StudentExperiment):
        raise ValueError(f"train.fused is for presets that train a DiT, and {preset} trains none; leave it out")
    match experiment:
        case TranslationExperiment():
            kind, task = card.TRANSLATOR, translation_task(experiment, pairs, val, out)
        case StudentExperiment():
            kind, task = card.TRANSLATOR, student_task(experiment, pairs, val, out)
        case AdversarialExperiment():
            kind, task = card.GENERATOR, adversarial_task(experiment, pairs, val)
        case AutoencoderExperiment():
            train_pixels, held = read_pixels(pairs, size), read_pixels(val[:6], size)
            given = load_vae(locate(experiment.init)) if experiment.init is not None else None
            kind, task = card.AUTOENCODER, AutoencoderTask(experiment.model, train_pixels, held, batch, seed, given)
        case DecoderExperiment():
            vae = load_vae(locate(experiment.vae))
            train_pixels, held = read_pixels(pairs, size), read_pixels(val[:6], size)
            kind, task = card.DECODER, AutoencoderTask(experiment.model, train_pixels, held, batch, seed, vae)
        case ClipExperiment():
            folder = data if data.is_dir() else data.parent
            captions, held_captions = (read_captions(folder, part) for part in (pairs, val))
            train_pixels, held = (read_pixels(part, size) for part in (pairs, val))
            kind = card.CLIP
            task = ClipTask(experiment.model, train_pixels, captions, held, held_captions, batch, seed)

    function = PRESETS.get(preset)
    told = card.Told(
        kind=kind,
        summary=(function.__doc__ or "").strip().splitlines()[0] if function is not None else "",
        experiment=plain,
        preset=to_json(function(), preset) if function is not None else {},
        data=data,
        found=found,
        out=out,
        minutes=minutes,
    )

    def describe(progress: Progress) -> None:
        write_experiment(out, plain)
        rows = read_history(out)
        write_atomically(out / card.CARD_FILE, card.model_card(told, progress, rows[-1] if rows else None))

    return train(task, experiment.train, out, experiment=plain, resume=resume, minutes=minutes, on_save=describe)


def _find(experiment: Experiment, plain: dict, data: Path, out: Path, resume: bool) -> PairSet:
    """The pairs, every one of them read once, so that no damaged file stops the training later."""
    if resume:
        check_same_experiment(read_progress(out).experiment, plain)
    else:
        _check_free(out)
    with tqdm(desc="reading pairs", unit="pair", disable=None) as bar:

        def show(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        found = find_pairs(data, direction=experiment.pairs.direction, read_pixels=True, on_pair=show)
    for problem in found.problems[:5]:
        logger.warning("left out %s", problem)
    if len(found.problems) > 5:
        logger.warning("and %d more; `clipdit data check %s` lists them", len(found.problems) - 5, data)
    for note in found.notes:
        logger.info("%s", note)
    counts = {name: len(found.split(name)) for name in ("train", "val", "test")}
    if not counts["train"]:
        raise ValueError(f"{data} holds no pairs to train on; `clipdit data check {data}` says what was found")
    logger.info("%d pairs to train on, %d val, %d test (%s)", *counts.values(), found.layout)
    return replace(found, scan=None)  # large, and of no more use


def _check_free(out: Path) -> None:
    """ValueError unless `out` is new, empty, or was left by a run that was killed before it had begun to train."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a new or empty folder")
    names = [path.name for path in out.iterdir()] if out.exists() else []
    if all(name in ("cache", ".lock") or name.endswith(".part") for name in names):
        return
    hint = "add --resume to go on, or give another folder" if STATE_FILE in names else "give a new or empty folder"
    raise ValueError(f"{out} is there already; {hint}")


def check_size(settings: PairSettings, downscale: int, patch: int) -> None:
    """ValueError unless the size divides into the DiT's tokens."""
    if settings.size % (downscale * patch):
        raise ValueError(
            f"pairs.size is {settings.size}; wanted a multiple of {downscale * patch} ({downscale} pixels a cell, patch {patch})"
        )


ALIKE = 0.8
"""Correlation of the latents of two VAEs from which a DiT of the one is taken as a beginning for the other: the built-in VAE kept
0.93 when it was fine-tuned (docs/choices.md). Where a beginning stops being worth it has not been measured."""


def begin_from(
    checkpoint: str, dit: DiT, vae: VAE, encoder: CLIPVisionModelWithProjection | None, images: UInt8[Tensor, "n 3 H W"]
) -> None:
    """Fill `dit` with the weights of a checkpoint's.

    ValueError unless the two are built alike and learnt to read the same CLIP, and a VAE that makes much the same latents of
    `images`: others mean nothing to it."""
    given = load_checkpoint(checkpoint)
    ours, theirs = ({k: v for k, v in m.config.items() if not k.startswith("_")} for m in (dit, given.transformer))
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"the DiT of --init {checkpoint} has {name} {theirs.get(name)}, this run {ours.get(name)}; they must be the same"
            )
    if fingerprint(encoder) != fingerprint(given.image_encoder):
        raise ValueError(f"the DiT of --init {checkpoint} was trained with another CLIP; give --clip {checkpoint}, too")
    if fingerprint(vae, leaving_out=is_of_decoder) != fingerprint(given.vae, leaving_out=is_of_decoder):  # a DiT sees no decoder
        alike = latent_correlation(Autoencoder(vae), Autoencoder(given.vae), to_float(images))
        told = f"the DiT of --init {checkpoint} was trained with another VAE; its latents and --vae's correlate by {alike:.2f}"
        if alike < ALIKE:
            raise ValueError(f"{told}, wanted {ALIKE} or more. Give --vae {checkpoint}, too, or leave --init out")
        logger.info("%s: near enough to begin with", told)
    dit.load_state_dict(given.transformer.state_dict())


TRAINING_OPERATIONS = "clipdit.training_operations"
"""Entry points: functions (device) -> Ops with gradients."""


def fused_operations(device: torch.device) -> Ops:
    """What --train.fused computes with. ValueError where there are none, or they do not run on this device."""
    for entry in entry_points(group=TRAINING_OPERATIONS):
        try:
            return entry.load()(device)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"train.fused needs the Python package {error.name}, which is not installed; install the extra kernels"
            ) from error
        except ValueError as error:
            raise ValueError(f"train.fused: {error}") from error
    raise ValueError("train.fused needs fused operations, and this installation has none")


def translation_task(experiment: TranslationExperiment, pairs: Sequence[Pair], val: Sequence[Pair], out: Path) -> TranslationTask:
    """Load the VAE and CLIP, make the DiT, and fill the cache or find it filled. `val` is for sample sheets.

    ValueError for whatever does not fit together; said before the minutes of caching."""
    settings, model = experiment.train, experiment.model
    vae = load_vae(locate(experiment.vae)).eval()
    bare = Autoencoder(vae)
    check_size(experiment.pairs, bare.downscale, model.patch)
    reads_clip = model.conditioning != "concat"
    wants_clip = reads_clip or experiment.loss.wants_clip
    encoder = load_clip(locate(experiment.clip)).eval() if wants_clip and experiment.clip else None
    clip = ClipImageEncoder(encoder) if encoder is not None and reads_clip else None
    torch.manual_seed(settings.seed)
    dit = model.make(
        latent_channels=bare.latent_channels,
        clip_token_width=clip.token_width if clip is not None else 1,
        clip_embedding_width=clip.embedding_width if clip is not None else 1,
    )
    if experiment.init is not None:
        images = read_pixels(val[:SHEET_ROWS], (experiment.pairs.size, experiment.pairs.size)).flatten(0, 1)
        begin_from(locate(experiment.init), dit, vae, encoder if reads_clip else None, images)
    parts = Parts(dit=dit, vae=vae, encoder=encoder, guidance=experiment.guidance, drop=experiment.drop_condition)
    return _on_latents(experiment, parts, pairs, val, out)


def student_task(experiment: StudentExperiment, pairs: Sequence[Pair], val: Sequence[Pair], out: Path) -> TranslationTask:
    """Load the teacher, copy its DiT, and fill the cache or find it filled. `val` is for sample sheets.

    ValueError for a teacher that is none, or of another size."""
    given = load_checkpoint(locate(experiment.teacher))
    dit: Network = given.transformer
    if not isinstance(dit, DiT) or not isinstance(given.objective, FlowMatching):
        kind = type(given.objective if isinstance(dit, DiT) else dit).__name__
        raise ValueError(f"--teacher {experiment.teacher} is of {kind}; a student learns from a DiT trained by FlowMatching")
    if (experiment.pairs.size,) * 2 != given.native_size:
        height, width = given.native_size
        raise ValueError(
            f"pairs.size is {experiment.pairs.size}; wanted the size of --teacher {experiment.teacher}, {width} x {height}"
        )
    mean, std = given.config["latents_mean"], given.config["latents_std"]
    parts = Parts(
        dit=copy.deepcopy(dit).requires_grad_(True).train(),
        vae=given.vae,
        encoder=given.image_encoder,
        teacher=given,
        statistics=Statistics(mean=mean, std=std) if mean is not None and std is not None else None,
    )
    return _on_latents(experiment, parts, pairs, val, out)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a DiT is trained with."""

    dit: DiT
    vae: VAE
    encoder: CLIPVisionModelWithProjection | None
    guidance: float = 1.0
    """Default of the checkpoint."""
    drop: float = 0.0
    """Share of the images whose source is withheld."""
    teacher: ClipDiTPipeline | None = None
    statistics: Statistics | None = None
    """Of the latents that the DiT knows; None are those of these targets."""


def _on_latents(
    experiment: TranslationExperiment | StudentExperiment, parts: Parts, pairs: Sequence[Pair], val: Sequence[Pair], out: Path
) -> TranslationTask:
    settings, dit = experiment.train, parts.dit
    if experiment.loss.wants_clip and parts.encoder is None:
        raise ValueError("loss.clip_similarity and loss.alignment need a CLIP, and this model has none; leave them out")
    size = (experiment.pairs.size, experiment.pairs.size)
    perceptual = PerceptualLoss(experiment.loss.perceptual_network) if experiment.loss.perceptual else None
    clip = ClipImageEncoder(parts.encoder) if parts.encoder is not None else None
    if settings.gradient_checkpointing:
        dit.enable_gradient_checkpointing()
    device = cast(torch.device, processes().device)
    if settings.fused:
        dit.use(fused_operations(device))
    bare = Autoencoder(parts.vae).to(device)
    if clip is not None:
        clip.to(device)
    folder = experiment.pairs.cache or out / "cache"
    aligned = experiment.loss.alignment > 0
    seen = clip if dit.reads_clip or aligned else None
    augment = experiment.pairs.augment
    cache = main_first(lambda: build_cache(folder, pairs, bare, seen, augment, size=size, of_targets=aligned))
    if parts.statistics is not None:
        cache.standardise_by(parts.statistics)
    pipeline = ClipDiTPipeline(
        dit,
        parts.vae,
        experiment.objective.to_scheduler(),
        parts.encoder if dit.reads_clip else None,
        latents_mean=cache.statistics.mean,
        latents_std=cache.statistics.std,
        image_size=size,
        default_steps=experiment.steps,
        default_guidance=parts.guidance,
        guidable=parts.drop > 0,
    )
    held, ends = val[:SHEET_ROWS], None
    if isinstance(experiment, StudentExperiment) and parts.teacher is not None:
        ends = _ends(experiment, parts.teacher, cache, out)
    return TranslationTask(
        pipeline,
        experiment.objective,
        experiment.loss,
        cache,
        Held(pixels=read_pixels(held, size), names=[pair.id for pair in held]),
        clip=clip,
        perceptual=perceptual,
        batch=settings.batch_size,
        seed=settings.seed,
        drop=parts.drop,
        steps=experiment.steps,
        guidance=parts.guidance,
        ends=ends,
    )


def _ends(experiment: StudentExperiment, teacher: ClipDiTPipeline, cache: LatentCache, out: Path) -> Ends:
    """What the teacher says, in the precision of training."""
    device, defaults = cast(torch.device, processes().device), teacher.sampling_defaults
    dtype = torch.bfloat16 if resolve_precision(experiment.train.precision, device) == "bf16" else torch.float32
    dit = teacher.transformer.requires_grad_(False).eval()
    nn.Module.to(dit, device, dtype)  # diffusers' own `to` has no types that fit
    return Ends(
        EagerBackend(teacher),
        dit,
        teacher.objective.table(experiment.ends.steps or defaults.steps),
        guidance=defaults.guidance if experiment.guidance is None else experiment.guidance,
        cache=cache,
        folder=out / "ends",
        batch=experiment.train.batch_size,
        seed=experiment.train.seed,
        settings=experiment.ends,
    )


def adversarial_task(experiment: AdversarialExperiment, pairs: Sequence[Pair], val: Sequence[Pair]) -> AdversarialTask:
    """Make the generator and what teaches it. `val` is for sample sheets. ValueError for a size that it cannot take."""
    size, seed = (experiment.pairs.size, experiment.pairs.size), experiment.train.seed
    torch.manual_seed(seed)
    generator = experiment.model.make(experiment.pairs.size)
    pipeline = ClipDiTPipeline(generator, Pixels(), Direct().to_scheduler(), image_size=size, default_steps=1, guidable=False)
    held = val[:SHEET_ROWS]
    return AdversarialTask(
        pipeline,
        experiment.loss,
        PixelStore(pairs, size),
        Held(pixels=read_pixels(held, size), names=[pair.id for pair in held]),
        augment=experiment.pairs.augment,
        batch=experiment.train.batch_size,
        seed=seed,
    )
