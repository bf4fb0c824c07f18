"""`clipdit bench`: measurements that need a quiet machine and some minutes."""

import json as json_module
from pathlib import Path
from typing import Annotated

import tyro


def bench(
    *,
    model: tuple[str, ...] = ("built-in",),
    out: Path,
    backends: tuple[str, ...] = (),
    data: Path | None = None,
    images: int = 8,
    steps: int | None = None,
    batches: tuple[int, ...] = (1, 4, 8),
    more_steps: tuple[int, ...] = (1, 4, 10, 20),
    seconds: float = 5.0,
    json: bool = False,
) -> int:
    """Latency, throughput, memory and pictures of models on all backends, side by side in one run.

    Writes OUT.json and, beside it, OUT.html, and plots of time against what is lost and of cost against batch and steps.

    The first model on its first backend is the reference.

    Args:
        model: checkpoints and bundles, by folder; "built-in" is the package's own.
        out: where the numbers go, a .json file.
        backends: which, as NAME or NAME:VARIANT; every variant on every backend that can run here if none is given.
        data: pairs, of which the test split is translated; the package's samples if not given.
        images: so many of them, at most.
        steps: of the solver; the model's own number if not given.
        batches: sizes for throughput.
        more_steps: one image is timed with so many steps, too.
        seconds: how long each kind of timing goes on.
        json: print the numbers as JSON.
    """
    from clipdit.backend import open_backend
    from clipdit.bench import run
    from clipdit.bench_report import cost_png, html, pareto_png, table
    from clipdit.cli import DONE
    from clipdit.files import write_atomically

    if out.suffix != ".json":
        raise ValueError(f"{out} is no .json file; give a file for the numbers")
    if images < 1 or seconds <= 0 or any(count < 1 for count in (*batches, *more_steps)):
        raise ValueError(
            f"images is {images}, seconds {seconds:g}, batches {batches}, more_steps {more_steps}; wanted more than 0"
        )
    candidates = [candidate for name in model for candidate in _candidates(name, backends)]
    size = open_backend(candidates[0].model, candidates[0].backend).limits.native_size
    sources, targets = _pictures(data, size, images)
    result = run(candidates, sources, targets_u8=targets, steps=steps, batches=batches, more_steps=more_steps, seconds=seconds)
    write_atomically(out, json_module.dumps(result.record(), indent=2) + "\n")
    pictures = {
        "": ("time of an image against the distance of pictures to the first row's", pareto_png(result)),
        "-cost": ("cost of an image against batch and steps", cost_png(result)),
    }
    for suffix, (_, png) in pictures.items():
        write_atomically(out.with_name(f"{out.stem}{suffix}.png"), png)
    write_atomically(out.with_suffix(".html"), html(result, list(pictures.values())))
    if json:
        print(json_module.dumps(result.record()))
    else:
        print(table(result))
        print("\n".join(f"left out: {label}: {reason}" for label, reason in result.left_out.items()))
        print(f"wrote {out.with_suffix('.html')}, and beside it {out.name} and {len(pictures)} plots")
    return DONE


def _candidates(model: str, backends: tuple[str, ...]):
    """Every variant on every backend that can run a model here, or those that were named."""
    from clipdit.backend import OfVariants, available_backends, backend_class, locate
    from clipdit.bench import Candidate

    folder = locate(model)
    reasons = available_backends(folder)
    names = list(backends) or [name for name, reason in reasons.items() if reason is None and name != "fake"]
    found = []
    for name in names:
        plain = name.partition(":")[0]
        if plain not in reasons:
            raise ValueError(f"there is no backend {plain}; there are {', '.join(reasons)}")
        if reasons[plain] is not None:
            continue  # another of the models may be what it runs
        kind = backend_class(plain)
        variants = kind.variants(Path(folder)) if isinstance(kind, OfVariants) and name == plain else []
        found += [Candidate(model=folder, backend=f"{plain}:{variant}") for variant in variants]
        found += [] if variants else [Candidate(model=folder, backend=name)]
    if not found:
        raise ValueError(
            f"none of {', '.join(names) or 'the backends'} can run {model} here; `clipdit doctor --model {model}` says why"
        )
    return found


def _pictures(data: Path | None, size: tuple[int, int], count: int):
    """Sources and targets, fitted."""
    import torch

    from clipdit.backend import builtin_checkpoint
    from clipdit.data.pairs import find_pairs
    from clipdit.data.pixels import read_pixels
    from clipdit.demo import read_samples
    from clipdit.images import fit

    if data is None:
        samples = read_samples(builtin_checkpoint().parent / "samples")
        sides = (samples.source[:count], samples.target[:count])
        return tuple(torch.stack([fit(image, size)[0] for image in side]) for side in sides)
    found = find_pairs(data, group_near_duplicates=False)
    held = found.split("test") or found.split("val") or found.pairs
    return read_pixels(held[:count], size).unbind(1)


def compare(
    old: Annotated[Path, tyro.conf.Positional],
    new: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    tolerance: float = 0.1,
    json: bool = False,
) -> int:
    """Compare two records of `clipdit bench`; exit code 4 when something became slower or its pictures worse.

    Args:
        old: JSON file of the earlier run.
        new: of the later one.
        tolerance: share of the speed, over the reference of the same run, that may be lost.
        json: print what became worse as JSON.
    """
    from clipdit.bench import read_record, regressions
    from clipdit.cli import CHECK_FAILED, DONE

    found = regressions(read_record(old), read_record(new), tolerance=tolerance)
    print(json_module.dumps({"regressions": found}) if json else "\n".join(found) or "nothing became worse")
    return CHECK_FAILED if found else DONE


def training(
    *,
    data: Path,
    out: Path,
    preset: str = "edges2emoji",
    vae: str | None = None,
    clip: str | None = None,
    batch_size: int | None = None,
    pairs: int = 512,
    seconds: float = 180.0,
    json: bool = False,
) -> int:
    """Training speed and memory of a preset's model against a plain loop over diffusers' DiT of equal size.

    Both train on the same cached latents at equal batch size and precision, each in a process of its own, and take turns. Also
    measured: how fast pairs are cached, the share of a step spent on reading them, and the preset's model as it is.

    Args:
        data: folder or manifest of pairs.
        out: where the numbers go, a .json file.
        preset: gives the model's size, the images' size, and the training settings; see `clipdit train --help`.
        vae: a folder or hub id; the preset's own if not given. `clip` likewise.
        clip: see vae.
        batch_size: images in a step; the preset's own if not given.
        pairs: at most so many are cached and trained on; speed does not depend on it.
        seconds: for all turns together; more are steadier.
        json: print the numbers as JSON.
    """
    from dataclasses import replace

    from clipdit.cli import DONE
    from clipdit.data.pairs import find_pairs
    from clipdit.experiment import TranslationExperiment
    from clipdit.files import write_atomically
    from clipdit.presets import PRESETS
    from clipdit.train.benchmark import measure

    names = [name for name, make in PRESETS.items() if isinstance(make(), TranslationExperiment)]
    if preset not in names:
        raise ValueError(f"{preset} is no preset that translates; there are {', '.join(names)}")
    if out.suffix != ".json":
        raise ValueError(f"{out} is no .json file; give a file for the numbers")
    if pairs < 1 or seconds <= 0:
        raise ValueError(f"pairs is {pairs} and seconds {seconds:g}; wanted at least 1, and more than 0")
    experiment = PRESETS[preset]()
    assert isinstance(experiment, TranslationExperiment)
    experiment = replace(experiment, vae=vae or experiment.vae, clip=clip or experiment.clip)
    if batch_size is not None:
        experiment = replace(experiment, train=replace(experiment.train, batch_size=batch_size))
    found = find_pairs(data, direction=experiment.pairs.direction, group_near_duplicates=False)
    chosen = (found.split("train") or found.pairs)[:pairs]
    if not chosen:
        raise ValueError(f"{data} holds no pairs; `clipdit data check {data}` says what was found")

    result = measure(experiment, chosen, seconds=seconds)
    write_atomically(out, json_module.dumps(result, indent=2) + "\n")
    print(json_module.dumps(result) if json else _table(result, out))
    return DONE


def _table(result: dict, out: Path) -> str:
    lines = [f"{'images/s':>9}  {'10-90 %':>15}  {'reading':>7}  {'peak MiB':>8}  {'M param.':>8}"]
    for name, side in result["sides"].items():
        speed = side["images_per_s"]
        spread = f"{speed['low']:.1f} - {speed['high']:.1f}"
        lines.append(
            f"{speed['median']:9.1f}  {spread:>15}  {side['loading_share']['median']:7.1%}  {side['peak_memory_mib']:8.0f}  "
            f"{side['parameters_million']:8.2f}  {name}"
        )
    ratio, caching, settings = result["speedup"], result["caching"], result["settings"]
    return "\n".join(
        [
            *lines,
            f"the first over the second: {ratio['median']:.2f} times ({ratio['low']:.2f} - {ratio['high']:.2f})",
            f"caching: {caching['pairs_per_s']:.1f} pairs/s, once",
            f"batch {settings['batch_size']}, {settings['precision']}, {settings['device']}; see {out}",
        ]
    )


VERBS = {"": bench, "compare": compare, "training": training}
