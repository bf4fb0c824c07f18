"""`clipdit demo`: the main job on the built-in checkpoint, and a page that shows it."""

import json as json_module
from pathlib import Path


def demo(*, out: Path = Path("demo"), backends: tuple[str, ...] = (), json: bool = False) -> int:
    """Translate the built-in samples, measure time and quality, and write a page that shows it.

    The checkpoint is exported first, to OUT/bundle, and run from there, beside the checkpoint itself. Writes report.html
    (everything on one page, no network needed), sheet.png, bench.json, and images/ with every translation.

    Args:
        out: folder for the results; files of an earlier demo in it are replaced.
        backends: to compare, the one that makes the pictures first; if none is given, all that are used without being asked for.
        json: print what bench.json holds.
    """
    from clipdit.backend import available_backends, builtin_checkpoint
    from clipdit.cli import DONE
    from clipdit.demo import export_bundle, run_demo, ways, write_demo

    reasons = available_backends()
    if unknown := [name for name in backends if name not in reasons]:
        raise ValueError(f"there is no backend {unknown[0]}; there are {', '.join(reasons)}")
    if backends:
        result = run_demo(backends={name: reasons[name] for name in backends})
    else:
        bundle, reason = export_bundle(builtin_checkpoint(), out / "bundle")
        result = run_demo(backends=ways(builtin_checkpoint(), bundle), bundle=bundle)
        if bundle is None:
            result.notes.append(f"The checkpoint was not exported: {reason}.")
    report, *others = write_demo(result, out)
    if json:
        print(json_module.dumps(result.record()))
    else:
        timing = result.variants[0].timing
        print(
            f"{len(result.samples.names)} held-out samples, {len(result.by_seed)} seeds each: "
            f"{timing.image_by_steps[result.steps].median:.0f} ms an image in {result.steps} steps on {result.variants[0].device}"
        )
        print(f"wrote {report} and {len(others)} files beside it; open it in a browser")
    return DONE
