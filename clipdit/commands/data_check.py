"""`clipdit data check`: every file of a data folder read once, the broken ones named with the reason."""

import json as json_format
import logging
import sys
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

log = logging.getLogger(__name__)

LINE_EVERY = 1000  # pairs, where there is no terminal to draw a bar on


def check(folder: Positional[Path], *, direction: Literal["AtoB", "BtoA"] = "AtoB", json: bool = False) -> int:
    """Read every pair of a data folder; list the broken ones with reasons.

    Exit code 0 when all is fine, 3 when some files cannot be used, 2 when no pair can.

    Args:
        folder: folder of pairs, or a manifest (.csv, .jsonl). docs/data.md shows the layouts.
        direction: AtoB: the source is on the left, or in the folder whose name says so. BtoA swaps.
        json: print the report as JSON.
    """
    from tqdm import tqdm

    from clipdit.data.check import check_folder

    terminal = sys.stderr.isatty()
    with tqdm(unit=" pairs", disable=not terminal, leave=False) as bar:

        def on_pair(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)
            if not terminal and done % LINE_EVERY == 0:
                log.info("%d of %d pairs read", done, of)

        checked = check_folder(folder, direction=direction, on_pair=on_pair)
    print(json_format.dumps(checked.to_json(), indent=2) if json else "\n".join(checked.lines()))
    if not checked.pairs:
        print(f"clipdit: {folder} has no usable pair; the list above says why", file=sys.stderr)
    return checked.exit_code
