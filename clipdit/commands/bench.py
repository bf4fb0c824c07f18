"""`clipdit bench ...`: measurements that need a quiet machine and some minutes."""

import json as json_module
from pathlib import Path


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


VERBS = {"training": training}
