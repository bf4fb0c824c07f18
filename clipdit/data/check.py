"""Reads a whole data folder before anybody trains on it: what it holds, and every file that cannot be used, with the reason."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from clipdit.data.layouts import Direction, some
from clipdit.data.pairs import PairSet, find_pairs
from clipdit.data.scan import Progress

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What `clipdit data check` prints. Plain values only: it goes to JSON as it is."""

    folder: str
    layout: str
    direction: Direction
    pairs: int
    """Usable ones."""
    splits: dict[str, int]
    groups: int
    """Near-duplicates count as one."""
    near_duplicates: int
    """Pairs that share their group with another."""
    sizes: dict[str, int]
    """Sources of each width x height, pixels; most frequent first."""
    problems: list[dict[str, str]]
    """`path`, relative to the folder where it is inside, and `reason`."""
    conversions: dict[str, list[str]]
    """Files that were usable after a conversion, by its kind."""
    notes: list[str]

    @property
    def exit_code(self) -> int:
        """0 all is fine, 3 some files are broken, 2 no pair is usable."""
        return 2 if not self.pairs else 3 if self.problems else 0

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for people: broken files first, the summary last, where a terminal shows it."""
        lines = [f"{problem['path']}: {problem['reason']}" for problem in self.problems]
        shown = [f"{size} ({count})" for size, count in list(self.sizes.items())[:5]]
        lines += [f"{len(paths)} files: {note} ({some(paths)})" for note, paths in self.conversions.items()]
        lines += self.notes
        lines += [
            f"{self.folder}: {self.layout}, {self.direction}",
            f"  pairs      {self.pairs} usable, {len(self.problems)} problems",
            f"  splits     {', '.join(f'{name} {count}' for name, count in self.splits.items())}",
            f"  groups     {self.groups}; {self.near_duplicates} pairs have a near-duplicate",
            f"  sizes      {', '.join(shown) or 'none'}{', ...' if len(self.sizes) > 5 else ''}",
        ]
        return lines


def check_folder(folder: Path, *, direction: Direction = "AtoB", on_pair: Progress | None = None) -> CheckReport:
    """Find the pairs of a folder or manifest and decode every one. ValueError when there is nothing that could be pairs."""
    return report(find_pairs(folder, direction=direction, read_pixels=True, on_pair=on_pair))


def report(found: PairSet) -> CheckReport:
    """The report on a set whose pixels were read (`find_pairs(..., read_pixels=True)`)."""
    assert found.scan is not None
    group_sizes = Counter(pair.group for pair in found.pairs)
    split_sizes = Counter(pair.split for pair in found.pairs)
    return CheckReport(
        folder=str(found.folder),
        layout=found.layout,
        direction=found.direction,
        pairs=len(found.pairs),
        splits={name: split_sizes[name] for name in SPLITS},
        groups=len(group_sizes),
        near_duplicates=sum(size for size in group_sizes.values() if size > 1),
        sizes={f"{width} x {height}": count for (height, width), count in found.scan.sizes.most_common()},
        problems=[{"path": _shown(problem.path, found.folder), "reason": problem.reason} for problem in found.problems],
        conversions={note: [_shown(path, found.folder) for path in paths] for note, paths in found.scan.conversions.items()},
        notes=found.notes,
    )


def _shown(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) and path != folder else str(path)
