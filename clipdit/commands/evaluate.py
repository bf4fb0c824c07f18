"""`clipdit evaluate`: metrics and a contact sheet on held-out pairs."""

import contextlib
import json as json_format
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    import torch

    from clipdit.data.pairs import PairSet
    from clipdit.metrics.judges import Judges
    from clipdit.translator import Translator

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 5.0
"""Between two lines of progress where there is no terminal, seconds."""


def evaluate(
    *,
    data: Path,
    out: Path,
    model: str | None = None,
    split: str = "test",
    direction: Literal["AtoB", "BtoA"] = "AtoB",
    backend: str | None = None,
    device: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    best_of: int = 8,
    seed: int = 0,
    limit: int | None = None,
    training_limit: int = 400,
    batch_size: int = 8,
    size: Annotated[str | None, tyro.conf.arg(metavar="PX|HxW")] = None,
    fit: Literal["pad", "crop", "stretch"] = "pad",
    faithfulness: Literal["auto", "edges", "clip", "both"] = "auto",
    tolerance: int | None = None,
    clip: str | None = None,
    rows: int = 12,
    floors_only: bool = False,
    json: bool = False,
) -> int:
    """Measure a model on held-out pairs: FILE.json, and a contact sheet FILE.png.

    Beside the model stand the real targets through its autoencoder (what it can reach at best), the source itself, the mean
    target (what is had for nothing) and the real targets, measured by the same code. What each number means is in
    docs/metrics.md. Pairs that cannot be read are named in the file; the exit code is then 3.

    Args:
        data: folder of pairs, or a manifest; layouts as in docs/data.md.
        out: the JSON file to write; the contact sheet goes beside it.
        model: checkpoint or bundle; the built-in one if not given.
        split: which pairs to translate. Targets of the split "train" serve as reference.
        direction: BtoA swaps source and target.
        backend: how to run the model; the best one that can run here if not given.
        device: cpu, cuda, cuda:1 ...; the best one here if not given.
        steps: sampling steps. The checkpoint's default if not given, as for guidance and solver.
        guidance: scale of classifier-free guidance; 1 is none.
        solver: euler, heun, dpmpp_2m, ddim ...: what the model's objective knows.
        best_of: seeds for each source; distances are given for one sample and for the best of these.
        seed: the first seed.
        limit: use this many of the pairs, drawn at random but always the same ones.
        training_limit: how many training targets to compare with.
        batch_size: images the model translates at once.
        size: side (or height x width) in pixels that pairs are fitted to; the model's own if not given.
        fit: how: pad adds a border, crop keeps the centre, stretch distorts.
        faithfulness: what is compared with the source. auto: edges if the sources are drawings, else CLIP embeddings.
        tolerance: how far an edge may lie from its line, pixels; 1 px for every 64 px of the side if not given.
        clip: folder or hub id of the CLIP that judges, "built-in" for the package's own; the model's if not given.
        rows: rows of the contact sheet.
        floors_only: measure no model, only the source itself, the mean target and the real targets.
        json: print the file's content.
    """
    from clipdit.cli import DONE, QUARANTINED
    from clipdit.data.pairs import find_pairs
    from clipdit.evaluate import Evaluator, choose, read_pairs
    from clipdit.evaluation_report import as_dict, sheet, table
    from clipdit.files import write_atomically
    from clipdit.images import write_image
    from clipdit.translator import Translator

    if out.suffix.lower() != ".json":
        raise ValueError(f"--out is {out}; wanted a name ending in .json (the contact sheet goes beside it as .png)")
    for name, value in (("limit", limit), ("best-of", best_of), ("batch-size", batch_size), ("training-limit", training_limit)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; wanted at least 1")
    if floors_only and model is not None:
        raise ValueError("--floors-only measures no model; leave --model out")
    out.parent.mkdir(parents=True, exist_ok=True)  # now, not after the work

    with contextlib.ExitStack() as stack:
        translator = None if floors_only else stack.enter_context(Translator.open(model, backend=backend, device=device))
        wanted_size = _size(size) or (translator.native_size if translator else (128, 128))
        logger.info("reading pairs of %s", data)
        found = find_pairs(data, direction=direction)
        chosen = choose(_split(found, split), limit)
        training = choose(found.split("train"), training_limit) if split != "train" else []
        pairs = read_pairs(chosen, wanted_size, fit)
        seen = read_pairs(training, wanted_size, fit) if training else None
        judges = _judges(translator, model, device, clip)
        logger.info("preparing %d pairs of split %s at %d x %d px", len(pairs), split, wanted_size[1], wanted_size[0])
        evaluator = Evaluator(
            pairs,
            judges,
            training_targets=seen.targets if seen else None,
            faithfulness=faithfulness,
            tolerance_px=tolerance,
        )
        settings: dict[str, object] = {}
        translate = autoencode = None
        if translator is not None:
            backend_name, limits = translator.backend.name, translator.backend.limits
            batch_size = min(batch_size, limits.max_batch or batch_size)
            sampling = asdict(translator.settings(steps=steps, guidance=guidance, solver=solver))
            settings = {"folder": model or "built-in", "backend": backend_name, "dtype": str(limits.dtype), **sampling}
            translate = _translate_with(translator, sampling)
            autoencode = _autoencode_with(translator) if limits.downscale > 1 else None
        on_progress = stack.enter_context(_progress(len(pairs)))
        evaluation = evaluator.run(
            translate,
            autoencode=autoencode,
            samples=best_of,
            first_seed=seed,
            batch_size=batch_size,
            sheet_rows=rows,
            on_progress=on_progress,
        )

    problems = {str(problem.path): problem.reason for problem in found.problems} | (seen.problems if seen else {})
    about = {"folder": str(data), "layout": found.layout, "split": split, "direction": direction, "fit": fit}
    report = {**as_dict(evaluation), "model": settings, "data": {**about, "problems": problems, "notes": found.notes}}
    write_atomically(out, json_format.dumps(report, indent=2, allow_nan=False) + "\n")
    picture = out.with_suffix(".png")
    title = f"{data.name} · {split} · {len(pairs)} pairs" + (f" · {settings['folder']}" if settings else "")
    write_image(picture, sheet(evaluation, title=title, rows=rows))
    if json:
        print(json_format.dumps(report, allow_nan=False))
    else:
        print(table(evaluation))
        for line in evaluation_lines(report):
            print(line)
        print(f"{out}, {picture}")
    return QUARANTINED if problems or pairs.problems else DONE


def evaluation_lines(report: dict) -> list[str]:
    """What stands under the table: warnings, what was not measured, pairs that could not be read."""
    lines = [f"warning: {line}" for line in report["warnings"]]
    lines += [f"not measured: {metric}: {reason}" for metric, reason in report["missing"].items()]
    unread = {**report["problems"], **report["data"]["problems"]}
    return lines + [f"not read: {path}: {reason}" for path, reason in unread.items()]


def _split(found: "PairSet", name: str) -> list:
    pairs = found.split(name)
    if not pairs:
        counts = {known: len(found.split(known)) for known in sorted({pair.split for pair in found.pairs})}
        there = ", ".join(f"{known} ({count})" for known, count in counts.items()) or "none"
        raise ValueError(f'{found.folder} has no pairs in split "{name}"; there are {there}. Choose with --split')
    return pairs


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) >= 32 for side in sides):
        raise ValueError(f"--size is {text}; wanted pixels, at least 32 a side, such as 128 or 128x192 (height x width)")
    return int(sides[0]), int(sides[-1])


def _autoencode_with(translator: "Translator") -> Callable[["torch.Tensor"], "torch.Tensor"]:
    backend = translator.backend

    def autoencode(images: "torch.Tensor") -> "torch.Tensor":
        return backend.decode(backend.encode(images).latent).cpu()

    return autoencode


def _translate_with(translator: "Translator", sampling: dict) -> Callable[["torch.Tensor", list[int]], "torch.Tensor"]:
    return lambda sources, seeds: translator(sources, seeds=seeds, **sampling)


def _judges(translator: "Translator | None", model: str | None, device: str | None, clip: str | None) -> "Judges":
    """Networks on the model's device, with the CLIP asked for, or else the one in the model's folder."""
    from clipdit.backend import BUILT_IN, locate
    from clipdit.metrics.judges import Judges

    place = translator.backend.limits.device if translator is not None else device or "cpu"
    if clip is not None:
        where = locate(clip)
    elif translator is None:
        return Judges.open(device=place, clip_missing="there is no model; name a CLIP with --clip")
    else:
        where = Path(locate(model or BUILT_IN)) / "image_encoder"
        if not where.is_dir():
            return Judges.open(device=place, clip_missing="the model's folder holds no image_encoder; name a CLIP with --clip")
    from clipdit.model.clip import ClipImageEncoder, load_clip

    encoder = ClipImageEncoder(load_clip(where)).to(place).eval()
    said = f"CLIP image encoder {clip}" if clip else "CLIP image encoder of the model itself (it conditions the model)"
    return Judges.open(device=place, clip=encoder, clip_name=said)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, else a line every few seconds."""
    from tqdm import tqdm

    terminal, last_s = sys.stderr.isatty(), time.monotonic()
    with tqdm(total=total, unit="source", disable=not terminal, leave=False) as bar:

        def show(done: int, of: int) -> None:
            nonlocal last_s
            bar.update(done - bar.n)
            if not terminal and time.monotonic() - last_s > PROGRESS_INTERVAL_S:
                last_s = time.monotonic()
                logger.info("%d of %d sources", done, of)

        yield show
