"""Finds the pairs of a data folder as it is, checks them, and splits them into train, val and test.

`find_pairs` is the only entrance: folders.py and manifest.py recognise what is there, scan.py reads pixels, groups.py keeps
near-duplicates in one split. No file is renamed, moved or written, and none is dropped without a `Problem` that says why.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clipdit.data.folders import find_layout
from clipdit.data.groups import MAX_DISTANCE, Groups, assign_splits
from clipdit.data.layouts import Direction, Layout, Pair, Problem
from clipdit.data.manifest import MANIFEST_NAMES, read_manifest
from clipdit.data.scan import Progress, Scan, scan
from clipdit.files import write_atomically

__all__ = ["Direction", "Pair", "PairSet", "Problem", "find_pairs"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """The usable pairs of a folder, and what stood in the way of the others."""

    folder: Path
    """As it was given: a folder, or a manifest."""
    layout: str
    """ "side-by-side", "two-folders" or "manifest"."""
    direction: Direction
    pairs: list[Pair]
    """In a fixed order, each with its split and group."""
    problems: list[Problem]
    notes: list[str]
    """Choices a person should know of, a line each."""
    scan: Scan | None
    """What reading all pixels showed; None when it was not needed."""

    def split(self, name: str) -> list[Pair]:
        """The pairs of "train", "val" or "test"; empty when there are none."""
        return [pair for pair in self.pairs if pair.split == name]


def find_pairs(
    folder: Path | str,
    *,
    direction: Direction = "AtoB",
    val_fraction: float = 0.05,
    test_fraction: float = 0.10,
    group_near_duplicates: bool = True,
    groups_file: Path | None = None,
    read_pixels: bool = False,
    on_pair: Progress | None = None,
) -> PairSet:
    """The pairs of a folder or manifest; layouts and their rules are in docs/data.md.

    Splits given by folders or a column are kept. Otherwise pairs are split by the hash of their near-duplicate group, which needs
    every image once (about 3 ms a pair and core); `group_near_duplicates=False` splits by the hash of each pair alone.

    Args:
        direction: "AtoB" has the source on the left, or in the folder whose name says source (SIDE_RANKS); "BtoA" swaps.
        val_fraction: how much of the pairs becomes val where no split is given.
        test_fraction: likewise test.
        groups_file: JSON file that keeps the groups: used while the images are unchanged, else written anew.
        read_pixels: decode every file even when no groups are needed, so that damaged ones are known now.
        on_pair: told of progress while pixels are read.

    Raises ValueError when there is no such folder, or nothing in it that could be pairs.
    """
    folder = Path(folder)
    if direction not in ("AtoB", "BtoA"):
        raise ValueError(f'direction is "{direction}"; wanted "AtoB" or "BtoA"')
    layout = _find_layout(folder, direction)
    pairs, problems, notes = layout.pairs, list(layout.problems), list(layout.notes)

    splits = {pair.split for pair in pairs}
    own_split = splits <= {"", "train"}
    if own_split and "train" in splits:
        notes.append("only train is given: val and test are taken from it")
    need_groups = own_split and group_near_duplicates and not all(pair.group for pair in pairs)

    fingerprint = _fingerprint(pairs) if need_groups and groups_file else ""
    kept = _load_groups(groups_file, fingerprint) if groups_file and fingerprint and not read_pixels else None
    scanned = scan(pairs, on_pair) if read_pixels or (need_groups and kept is None) else None
    if kept is not None:
        problems += kept.problems
        pairs = [replace(pair, group=kept.groups[pair.id]) for pair in pairs if pair.id in kept.groups]
    else:
        if scanned is not None:
            problems += scanned.problems
            pairs = scanned.pairs
        pairs = _group(pairs, scanned if need_groups else None)
        if groups_file and fingerprint and scanned is not None:
            _save_groups(groups_file, fingerprint, pairs, scanned.problems)

    if own_split:
        names = assign_splits([pair.group for pair in pairs], val_fraction=val_fraction, test_fraction=test_fraction)
        pairs = [replace(pair, split=name) for pair, name in zip(pairs, names, strict=True)]
    else:
        if without := sum(not pair.split for pair in pairs):
            notes.append(f"{without} pairs without a split, among others with one, are taken as train")
        pairs = [pair if pair.split else replace(pair, split="train") for pair in pairs]
        if leaks := _groups_in_several_splits(pairs):
            notes.append(f"{leaks} groups (equal files, or the same group given) are in more than one split")
    logger.debug("%s: %s, %d pairs, %d problems", folder, layout.name, len(pairs), len(problems))
    return PairSet(
        folder=folder, layout=layout.name, direction=direction, pairs=pairs, problems=problems, notes=notes, scan=scanned
    )


def _find_layout(folder: Path, direction: Direction) -> Layout:
    if folder.is_file():
        if folder.suffix.lower() not in (".csv", ".jsonl"):
            raise ValueError(f"{folder} is a file; wanted a folder of pairs, or a manifest ending in .csv or .jsonl")
        return read_manifest(folder, direction)
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; wanted a folder of pairs, or a manifest ending in .csv or .jsonl")
    manifests = [folder / name for name in MANIFEST_NAMES if (folder / name).is_file()]
    if len(manifests) > 1:
        raise ValueError(f"{folder} has both {' and '.join(MANIFEST_NAMES)}; keep one, or give one of them instead of the folder")
    return read_manifest(manifests[0], direction) if manifests else find_layout(folder, direction)


def _group(pairs: Sequence[Pair], scanned: Scan | None) -> list[Pair]:
    """The pairs with their groups: given ones, and whatever shares a file or (with a scan) nearly shares its pixels."""
    groups = Groups(len(pairs))
    groups.join_equal([{f"file {pair.source}", f"file {pair.target}"} | {f"group {pair.group}"} - {"group "} for pair in pairs])
    if scanned is not None:
        groups.join_near(scanned.descriptors)
    first = [pairs[groups.of(item)] for item in range(len(pairs))]
    return [replace(pair, group=one.group or one.id) for pair, one in zip(pairs, first, strict=True)]


def _groups_in_several_splits(pairs: Sequence[Pair]) -> int:
    splits: dict[str, set[str]] = {}
    for pair in pairs:
        splits.setdefault(pair.group, set()).add(pair.split)
    return sum(len(names) > 1 for names in splits.values())


@dataclass(frozen=True, kw_only=True)
class _Kept:
    groups: dict[str, str]
    """Group of each readable pair, by id."""
    problems: list[Problem]


def _fingerprint(pairs: Sequence[Pair]) -> str:
    """Changes when a file does, by name, size or time of change."""
    digest = hashlib.sha256(f"groups 1, distance {MAX_DISTANCE}".encode())
    for pair in pairs:
        for path in (pair.source, pair.target):
            status = path.stat()
            digest.update(f"{pair.id}|{path}|{pair.group}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _load_groups(path: Path, fingerprint: str) -> _Kept | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["fingerprint"] != fingerprint:
            return None
        return _Kept(groups=kept["groups"], problems=[Problem(Path(file), reason) for file, reason in kept["problems"]])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of groups ({type(error).__name__}); delete it, and it is made again") from error


def _save_groups(path: Path, fingerprint: str, pairs: Sequence[Pair], problems: Sequence[Problem]) -> None:
    kept = {
        "fingerprint": fingerprint,
        "groups": {pair.id: pair.group for pair in pairs},
        "problems": [[str(problem.path), problem.reason] for problem in problems],
    }
    write_atomically(path, json.dumps(kept))
