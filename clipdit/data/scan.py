"""Reads the pixels of every pair once: which can be decoded, what they are like, and where their edges lie."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from clipdit.data.groups import describe
from clipdit.data.layouts import Pair, Problem, Size
from clipdit.images import ImageError

Progress = Callable[[int, int], None]
"""Called with (pairs done, pairs in all)."""


@dataclass(kw_only=True)
class Scan:
    """What reading all pixels showed."""

    pairs: list[Pair] = field(default_factory=list)
    """Pairs that can be read."""
    problems: list[Problem] = field(default_factory=list)
    sizes: Counter[Size] = field(default_factory=Counter)
    """How many sources have each (height, width), pixels."""
    conversions: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    """Files by what had to be done to them: "16 bits reduced to 8" ..."""
    descriptors: Float[Tensor, "n F"] = field(default_factory=lambda: torch.empty(0, 0))
    """clipdit.data.groups.describe of each pair in `pairs`. fp16: 200 MB for 50,000 pairs."""


def scan(pairs: Sequence[Pair], on_pair: Progress | None = None) -> Scan:
    """Decode every pair, on several threads (Pillow decodes without Python's lock). A file that cannot be read is a problem."""
    result = Scan()
    descriptors: list[Tensor] = []  # (F,) each
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        try:
            for done, (pair, seen) in enumerate(zip(pairs, pool.map(_look, pairs), strict=True), 1):
                if isinstance(seen, ImageError):
                    result.problems.append(Problem(seen.path or pair.source, seen.reason))
                else:
                    result.pairs.append(pair)
                    result.sizes[seen.size] += 1
                    for path, notes in seen.notes.items():
                        for note in notes:
                            result.conversions[note].append(path)
                    descriptors.append(seen.descriptor)
                if on_pair is not None:
                    on_pair(done, len(pairs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # else an interrupt would wait for all that is queued
            raise
    if descriptors:
        result.descriptors = torch.stack(descriptors)
    return result


@dataclass(frozen=True, kw_only=True)
class _Seen:
    size: Size
    notes: dict[Path, tuple[str, ...]]
    descriptor: Float[Tensor, "F"]


def _look(pair: Pair) -> _Seen | ImageError:
    try:
        source, target = pair.decode()
    except ImageError as error:
        return error
    height, width = source.pixels.shape[-2:]
    return _Seen(
        size=(height, width),
        notes={pair.source: source.notes, pair.target: target.notes},
        descriptor=describe(source.pixels, target.pixels).half(),
    )
