"""`clipdit data emoji`: a real, permissively licensed paired set from public packages."""

import json as json_format
import logging
import sys
from pathlib import Path
from typing import Literal

log = logging.getLogger(__name__)

LINE_EVERY = 400  # pairs, where there is no terminal to draw a bar on


def emoji(
    *,
    out: Path,
    task: Literal["edges2emoji", "emoji2flat"] = "edges2emoji",
    size: int = 128,
    skin_tones: bool = False,
    archives: Path | None = None,
    json: bool = False,
) -> int:
    """Build a paired set of Fluent emoji (MIT), with a fixed train/val/test split.

    Needs npm, which fetches the packages by name, unless --archives is given.

    Args:
        out: folder to make. A folder that already holds this very set is left as it is; any other non-empty one is refused.
        task: edges2emoji: edges of the 3-D render -> the render. emoji2flat: the 3-D render -> the flat drawing.
        size: height and width of the images, pixels, from 16 to 256.
        skin_tones: keep the skin-tone variants as well; each stays in the split of its emoji.
        archives: folder with the packages' .tgz files, already downloaded by `npm pack`.
        json: print what was built as JSON.
    """
    from tqdm import tqdm

    from clipdit.data.emoji import build

    terminal = sys.stderr.isatty()
    with tqdm(unit=" pairs", disable=not terminal, leave=False) as bar:

        def on_pair(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)
            if not terminal and done % LINE_EVERY == 0:
                log.info("%d of %d pairs", done, of)

        made = build(out, task=task, size=size, skin_tones=skin_tones, archives=archives, on_pair=on_pair)
    if json:
        print(json_format.dumps({"folder": str(made.folder), "counts": made.counts, "already_there": made.already_there}))
    else:
        counts = ", ".join(f"{count} {split}" for split, count in made.counts.items())
        print(f"{made.folder}: {'already there, ' if made.already_there else ''}{counts} pairs")
    return 0
