"""`clipdit demo`: the main job on the built-in checkpoint, and a page that shows it."""

import json as json_module
from pathlib import Path


def demo(*, out: Path = Path("demo"), json: bool = False) -> int:
    """Translate the built-in samples, measure time and quality, and write a page that shows it.

    Writes report.html (everything on one page, no network needed), sheet.png, bench.json, and images/ with every translation.

    Args:
        out: folder for the results; files of an earlier demo in it are replaced.
        json: print what bench.json holds.
    """
    from clipdit.cli import DONE
    from clipdit.demo import run_demo, write_demo

    result = run_demo()
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
