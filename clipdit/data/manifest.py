"""Pairs named in a file: CSV with a header, or one JSON object a line.

Columns `source` and `target` are paths, relative to the manifest's folder or absolute; `split`, `group` and `id` may be left out.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from clipdit.data.layouts import SPLIT_NAMES, Direction, Layout, Pair, Problem

MANIFEST_NAMES = ("manifest.csv", "manifest.jsonl")
"""What a folder's own manifest is called. Another name is found when the file itself is given."""

COLUMNS = ("source", "target", "split", "group", "id")


def read_manifest(path: Path, direction: Direction) -> Layout:
    """The pairs of a manifest. ValueError when the file as a whole is no manifest; a row that cannot be used is a problem."""
    layout = Layout(name="manifest")
    pairs: list[tuple[int, Pair]] = []
    rows = list(_rows(path))
    home = _home([row["source"] for _, row in rows if row.get("source")])
    for line, row in rows:
        try:
            pairs.append((line, _pair(row, path.parent, home, direction)))
        except ValueError as error:
            layout.problems.append(Problem(path, f"line {line}: {error}"))
    if not pairs and not layout.problems:
        raise ValueError(f"{path} names no pairs; wanted rows with {', '.join(COLUMNS[:2])}")
    taken = Counter(pair.id for _, pair in pairs)
    for line, pair in pairs:
        # One source with several targets, say. The line keeps the ids apart.
        layout.add(pair if taken[pair.id] == 1 else replace(pair, id=f"{pair.id}-line{line}"))
    return layout


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, fields). A line that cannot be parsed yields {"error": why}."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel writes the mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield number, _json_fields(line)
        return
    reader = csv.DictReader(text.splitlines(), restkey="error", skipinitialspace=True)
    reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    if not {"source", "target"} <= set(reader.fieldnames):
        found = ", ".join(reader.fieldnames) or "nothing"
        raise ValueError(
            f"{path} has the columns {found}; wanted source and target (and perhaps split, group, id), comma-separated"
        )
    for row in reader:
        if "error" in row:
            yield reader.line_num, {"error": f"has more than {len(reader.fieldnames)} fields; quote paths that hold commas"}
        else:
            yield reader.line_num, {name: (value or "").strip() for name, value in row.items()}


def _json_fields(line: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return {"error": f"is no JSON ({error.msg})"}
    if not isinstance(row, dict):
        return {"error": f"is {type(row).__name__}; wanted an object with source and target"}
    return {name: str(row[name]).strip() for name in COLUMNS if row.get(name) is not None}


def _home(sources: list[str]) -> str:
    """The folder that holds all sources with absolute paths: ids begin below it, so that they are the same, and say nothing of
    the machine, wherever the images lie."""
    folders = [os.path.dirname(source) for source in sources if source.startswith("/")]
    return os.path.commonpath(folders) if folders else "/"


def _pair(row: dict[str, str], folder: Path, home: str, direction: Direction) -> Pair:
    """A row's pair. ValueError says what is wrong with the row."""
    if "error" in row:
        raise ValueError(row["error"])
    for name in ("source", "target"):
        if not row.get(name):
            raise ValueError(f"has no {name}")
    split = row.get("split", "").lower()
    if split not in ("", *SPLIT_NAMES):
        raise ValueError(f'split is "{split}"; wanted train, val or test')
    source, target = _path(folder, row["source"]), _path(folder, row["target"])
    if direction == "BtoA":
        source, target = target, source
    # The id tells the row, whichever way the pair is used.
    id = row.get("id") or Path(_below(home, row["source"]).replace("\\", "/")).with_suffix("").as_posix().lstrip("/.")
    return Pair(id=id, source=source, target=target, split=SPLIT_NAMES.get(split, ""), group=row.get("group", ""))


def _below(home: str, source: str) -> str:
    return os.path.relpath(source, home) if source.startswith("/") else source


def _path(folder: Path, text: str) -> Path:
    path = folder / text
    # Written on Windows, perhaps. Only when nothing has the name as it stands: a backslash is a legal character elsewhere.
    return path if path.exists() or "\\" not in text else folder / text.replace("\\", "/")
