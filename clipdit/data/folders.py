"""Recognises how a folder holds its pairs: side-by-side images, or two folders with equal file names, in any nesting with splits.

Nothing needs renaming: what counts is which folders hold the same file names, and what the folders' names say of their role.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path, PurePath

from clipdit.data.layouts import SPLIT_NAMES, Direction, Layout, Pair, Problem, Size, some
from clipdit.images import ImageError, image_size, looks_like_image

SIDE_RANKS = {
    name: rank
    for rank, names in enumerate(
        (
            "a source sources src input inputs",
            "edge edges line lines lineart sketch sketches drawing drawings label labels seg segmentation gray grey lowres lr",
            "face faces photo photos real img image images",
            "",  # rank 3: any other name
            "comic comics cartoon cartoons anime painting paintings art emoji emojis stylized stylised color colour highres hr",
            "b target targets tgt output outputs gt groundtruth",
        )
    )
    for name in names.split()
}
"""Which of two folders is the source: the one of lower rank. `edges` -> `photos`, but `photos` -> `comics`."""
OTHER_RANK = 3


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A file, and what its path says."""

    file: PurePath
    split: str
    folders: tuple[str, ...]
    """Folders above the file, without what names a split: `trainA` is split "train" and folder "A"."""

    def key(self, depth: int | None) -> tuple[str, ...]:
        """What partners have in common when the folder at `depth` names the side (None: no folder does)."""
        folders = self.folders if depth is None else (*self.folders[:depth], *self.folders[depth + 1 :])
        return (*filter(None, [self.split]), *folders, self.file.stem)


@dataclass(frozen=True, kw_only=True)
class _Sides:
    depth: int
    source: str
    target: str
    known: bool
    """Whether the names themselves say which is which."""


def find_layout(folder: Path, direction: Direction) -> Layout:
    """Recognise the layout of a folder of images. ValueError when there is none to be recognised."""
    files, notes, problems = _list_images(folder)
    if not files:
        raise ValueError(
            f"{folder} holds no images; wanted side-by-side images, two folders with equal file names, or a manifest"
        )
    places = [_locate(file) for file in files]
    sides = _find_sides(places, folder)
    # Folders of any two names may be classes of side-by-side images, each counted from 1: then their images tell.
    if sides is None or (not sides.known and all(map(_is_two_to_one, _headers(folder, places).values()))):
        layout = _side_by_side(folder, places, direction)
    else:
        layout = _two_folders(folder, places, sides, direction)
    layout.notes += notes
    layout.problems += problems
    return layout


def _list_images(folder: Path) -> tuple[list[PurePath], list[str], list[Problem]]:
    """Image files below folder, sorted and relative to it; notes; folders that could not be opened."""
    images: list[PurePath] = []
    others: list[str] = []
    problems: list[Problem] = []

    def on_error(error: OSError) -> None:
        problems.append(Problem(Path(error.filename), f"cannot be opened: {error.strerror}"))

    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=on_error):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        # Hidden files and __MACOSX are what operating systems leave behind, some of it named like images.
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith("."):
                continue
            if looks_like_image(path):
                images.append(path.relative_to(folder))
            else:
                others.append(str(path.relative_to(folder)))
    notes = [f"{len(others)} files that are no images were passed over: {some(others)}"] if others else []
    return sorted(images), notes, problems


def _locate(file: PurePath) -> _Place:
    split, folders = "", []
    for part in file.parts[:-1]:
        found, rest = ("", part) if split else _split_in(part)
        split = split or found
        folders += [rest] if rest else []
    return _Place(file=file, split=split, folders=tuple(folders))


def _split_in(part: str) -> tuple[str, str]:
    """The split that a folder's name tells, and the rest of the name: train, trainA, train_A, test-label."""
    longest_first = "|".join(sorted(SPLIT_NAMES, key=len, reverse=True))
    match = re.fullmatch(rf"({longest_first})(?:[_\-. ](.+)|([ABab]))?", part, flags=re.IGNORECASE)
    return (SPLIT_NAMES[match[1].lower()], match[2] or match[3] or "") if match else ("", part)


def _rank(name: str) -> int:
    return SIDE_RANKS.get(re.sub(r"[^a-z]", "", name.lower()), OTHER_RANK)


def _find_sides(places: Sequence[_Place], folder: Path) -> _Sides | None:
    """The two folder names that hold sources and targets: two names at one depth of the tree, with the same files below them."""
    options: list[tuple[int, int, int, str, str]] = []  # (files in common, difference of rank, -depth, name, name)
    for depth in range(max(len(place.folders) for place in places)):
        keys: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        for place in places:
            if len(place.folders) > depth:
                keys[place.folders[depth]].add(place.key(depth))
        # Many names at one depth are classes or dates rather than sides, and trying all pairs of them would take long.
        names = sorted(keys) if len(keys) <= 12 else sorted(name for name in keys if _rank(name) != OTHER_RANK)
        for one, two in combinations(names, 2):
            if common := len(keys[one] & keys[two]):
                options.append((common, abs(_rank(one) - _rank(two)), -depth, one, two))
    if not options:
        return None
    most = max(common for common, *_ in options)
    # Among names with about as many files in common, those whose meaning differs most: source and target before source and mask.
    options = sorted((o for o in options if 2 * o[0] >= most), key=lambda o: (o[1], o[0], o[2]), reverse=True)
    if len(options) > 1 and options[0][:3] == options[1][:3]:
        names = sorted({name for option in options for name in option[3:]})
        raise ValueError(
            f"{folder}: cannot tell which two of the folders {', '.join(names)} belong together; write a manifest.csv"
        )
    _, difference, minus_depth, one, two = options[0]
    source, target = sorted((one, two), key=lambda name: (_rank(name), name))
    return _Sides(depth=-minus_depth, source=source, target=target, known=difference > 0)


def _two_folders(folder: Path, places: Sequence[_Place], sides: _Sides, direction: Direction) -> Layout:
    layout = Layout(name="two-folders")
    source_side, target_side = (sides.source, sides.target) if direction == "AtoB" else (sides.target, sides.source)
    if not sides.known:
        layout.notes.append(
            f"{source_side}/ is taken as source and {target_side}/ as target: the names do not say; direction BtoA swaps them"
        )
    by_key: dict[tuple[str, ...], dict[str, list[_Place]]] = defaultdict(lambda: {source_side: [], target_side: []})
    outside: list[str] = []
    for place in places:
        side = place.folders[sides.depth] if len(place.folders) > sides.depth else ""
        if side in (source_side, target_side):
            by_key[place.key(sides.depth)][side].append(place)
        else:
            outside.append(str(place.file))
    if outside:
        layout.notes.append(
            f"{len(outside)} images in neither {source_side}/ nor {target_side}/ were passed over: {some(outside)}"
        )
    for key, by_side in sorted(by_key.items()):
        sources, targets = by_side[source_side], by_side[target_side]
        if len(sources) == len(targets) == 1:
            source, target = folder / sources[0].file, folder / targets[0].file
            layout.add(Pair(id="/".join(key), source=source, target=target, split=sources[0].split))
            continue
        for place in sources:
            layout.problems.append(Problem(folder / place.file, _why_unpaired(place, sources, targets, target_side)))
        for place in targets:
            layout.problems.append(Problem(folder / place.file, _why_unpaired(place, targets, sources, source_side)))
    return layout


def _why_unpaired(place: _Place, same_side: list[_Place], partners: list[_Place], partner_side: str) -> str:
    if not partners:
        return f"has no partner {place.file.stem}.* in {partner_side}/"
    double = same_side if len(same_side) > 1 else partners
    names = " and ".join(sorted(other.file.name for other in double))
    return f"cannot be paired: {names} in one folder have the same name but for the suffix. Keep one"


def _side_by_side(folder: Path, places: Sequence[_Place], direction: Direction) -> Layout:
    layout = Layout(name="side-by-side")
    headers = _headers(folder, places)
    sizes = {path: size for path, size in headers.items() if not isinstance(size, ImageError)}
    narrow = [path for path, (height, width) in sizes.items() if width <= height]
    if 2 * len(narrow) > len(sizes):
        height, width = sizes[narrow[0]]
        raise ValueError(
            f"{narrow[0]} is {width} x {height}, a single picture, and no two folders here share file names; wanted images with "
            "source and target side by side, two folders with equal file names, or a manifest.csv"
        )
    # When nearly all are 2:1, which is what tools write, another shape is a stray picture rather than a pair.
    strict = sum(map(_is_two_to_one, sizes.values())) >= 0.9 * len(sizes)
    if not strict:
        layout.notes.append("images are cut in the middle as side-by-side pairs, but are not twice as wide as high: look at some")
    taken = Counter(place.key(None) for place in places)
    for place in places:
        path, key = folder / place.file, place.key(None)
        if reason := _not_side_by_side(headers[path], strict):
            layout.problems.append(Problem(path, reason))
            continue
        # Two files that differ in the suffix only are two pairs here, and their ids keep it.
        id = "/".join(key) + ("" if taken[key] == 1 else place.file.suffix)
        half = "left" if direction == "AtoB" else "right"
        layout.pairs.append(Pair(id=id, source=path, target=path, source_half=half, split=place.split))
    return layout


def _not_side_by_side(header: Size | ImageError, strict: bool) -> str:
    """Why an image is no side-by-side pair; "" when it may be one."""
    if isinstance(header, ImageError):
        return header.reason
    height, width = header
    if strict and not _is_two_to_one(header):
        return f"is {width} x {height}; wanted twice as wide as high, like the others here"
    return f"is {width} x {height}; a side-by-side image must have an even width" if width % 2 else ""


def _headers(folder: Path, places: Sequence[_Place]) -> dict[Path, Size | ImageError]:
    """(height, width) of every image, or why its header cannot be read."""
    headers: dict[Path, Size | ImageError] = {}
    for place in places:
        path = folder / place.file
        try:
            headers[path] = image_size(path)
        except ImageError as error:
            headers[path] = error
    return headers


def _is_two_to_one(size: Size | ImageError) -> bool:
    if isinstance(size, ImageError):
        return False
    height, width = size
    return abs(width - 2 * height) <= 0.02 * height
