"""`clipdit results`: the comparison with the baselines and the paper's recipe, from data to tables and figures."""

import json as json_format
import logging
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)


def results(
    *,
    data: Path,
    out: Path,
    minutes: float = 30.0,
    preset: Literal["edges2emoji", "edges2shoes", "face2comics"] = "edges2emoji",
    methods: list[str] | None = None,
    ablations: bool = False,
    seeds: list[int] | None = None,
    ablation_seeds: int = 1,
    vae: str | None = None,
    clip: str | None = None,
    judge_clip: str | None = None,
    size: int | None = None,
    direction: Literal["AtoB", "BtoA"] = "AtoB",
    best_of: int = 8,
    limit: int | None = None,
    compile: bool = False,
    device: str | None = None,
    json: bool = False,
) -> int:
    """Compare Pix2Pix, Pix2PixHD, the paper's recipe, ours and a few-step student: trained for the same time on the same pairs.

    DIR/results.md, results.json, the architecture, loss curves and unseen pairs side by side. What is there is not done again: a
    comparison that was stopped goes on, and more methods or seeds come to what is there.

    Args:
        data: folder of pairs, or a manifest; layouts as in docs/data.md.
        out: folder of the comparison.
        minutes: of training, for each method and seed.
        preset: ours; the other methods take their pairs and size from it.
        methods: what to compare; the baselines, the paper's recipe, ours and the student if not given.
        ablations: and ours with one part exchanged at a time.
        seeds: one run of each method for each; 0 if not given.
        ablation_seeds: so many of the seeds, the first, for each ablation.
        vae: of the methods that work on latents; the preset's if not given.
        clip: likewise; "built-in" is the package's own.
        judge_clip: the CLIP that judges; `clip` if not given.
        size: side in pixels; the preset's if not given.
        direction: BtoA swaps source and target.
        best_of: samples of each source.
        limit: use this many held-out pairs.
        compile: torch.compile every network: minutes at the start of each run, which count.
        device: for evaluation, cpu, cuda ...; training takes the best one here.
        json: print results.json.
    """
    from dataclasses import replace

    from clipdit.cli import CHECK_FAILED, DONE
    from clipdit.files import write_atomically
    from clipdit.presets import edges2emoji, edges2shoes, face2comics
    from clipdit.results.comparison import Plan, compare
    from clipdit.results.figures import draw_all
    from clipdit.results.methods import MAIN, METHODS
    from clipdit.results.tables import markdown
    from clipdit.results.tables import results as found_in

    base = {"edges2emoji": edges2emoji, "edges2shoes": edges2shoes, "face2comics": face2comics}[preset]()
    pairs = replace(base.pairs, direction=direction, **({"size": size} if size is not None else {}))
    train = replace(base.train, compile=compile)
    base = replace(base, pairs=pairs, train=train, **{k: v for k, v in (("vae", vae), ("clip", clip)) if v is not None})
    chosen = tuple(methods) if methods else tuple(METHODS) if ablations else MAIN
    plan = Plan(
        data=data,
        base=base,
        preset=preset,
        methods=chosen,
        minutes=minutes,
        seeds=tuple(seeds or [0]),
        ablation_seeds=ablation_seeds,
        best_of=best_of,
        limit=limit,
        clip=judge_clip,
    )
    failed = compare(plan, out, device=device)
    plain = found_in(plan, out, failed)
    write_atomically(out / "results.json", json_format.dumps(plain, indent=2, allow_nan=False) + "\n")
    write_atomically(out / "results.md", markdown(plain))
    figures = draw_all(plan, out, device=device)
    if json:
        print(json_format.dumps(plain, allow_nan=False))
    else:
        print(markdown(plain))
        print(", ".join(str(path) for path in (out / "results.md", out / "results.json", *figures)))
    return CHECK_FAILED if failed else DONE
