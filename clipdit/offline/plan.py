"""Which inputs a job has, where each one's output goes, and with which seed.

Everything that can be wrong with the list itself (two inputs with one output, an output on top of an input, a manifest with a
mistake in it) is found here, before any image is read. What is wrong with one image is found later and quarantines only that.
"""

import csv
import functools
import hashlib
import io
import json
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path, PurePosixPath

import numpy as np

from clipdit.decoding import FOREIGN_SUFFIXES, IMAGE_SUFFIXES
from clipdit.images import WRITE_FORMATS, looks_like_image
from clipdit.offline import sources

MANIFEST_SUFFIXES = (".csv", ".jsonl", ".txt")

COLUMNS = ("source", "output", "seed", "id")
"""What a manifest may say. `source` is needed; the others have defaults."""

PAIR_COLUMNS = ("target", "split", "group")
"""Columns of a manifest of training pairs, which may be translated as it is; they are not read here."""

_PICTURE_SUFFIXES = IMAGE_SUFFIXES | FOREIGN_SUFFIXES

WORK_FOLDER = ".clipdit"
"""Folder in the output folder for the lock and for files not yet complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One input of a job."""

    id: str
    """Unique in the job: the path relative to the input folder, or what the manifest calls it."""
    source: str
    """Absolute path of the image file, or its URL."""
    output: str
    """Where the result goes, relative to the output folder, parts separated by "/". Its suffix is the format."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The inputs of a job, in the order in which they are read."""

    items: list[Item]
    ignored: list[str] = field(default_factory=list)
    """What lies in the input folder and is not an input, each with its reason."""
    unreadable: list[str] = field(default_factory=list)
    """Sub-folders that could not be listed, each with its reason: there may be images in them."""


def item_seed(seed: int, id: str) -> int:
    """The seed of one image of a job, 32 bits: from the job's seed and the image's id alone, so that neither order, nor batches,
    nor a resume, nor other images change it. `clipdit translate FILE OUT --seed N` with this number makes the same image."""
    return int.from_bytes(hashlib.blake2b(b"%d\0" % seed + os.fsencode(id), digest_size=4).digest(), "big")


def plan_folder(folder: Path, output: Path, *, seed: int = 0, suffix: str = ".png", keep_suffix: bool = False) -> Plan:
    """All images below a folder, in the order of their names; the output folder has the same sub-folders.

    An input is a file whose name or first bytes promise an image; other files are listed as ignored. Hidden files and folders and
    the output folder itself are passed over. Links to files are followed, links to folders are not, but listed.

    Args:
        folder: the input folder. output: the output folder; need not exist.
        seed: of the job; see `item_seed`.
        suffix: of the outputs, with its dot.
        keep_suffix: a.jpg becomes a.jpg.png and not a.png.

    Raises:
        ValueError: two inputs with one output, no images, output and input folder are the same.
    """
    root, target = folder.absolute(), output.resolve()
    if target == root.resolve():
        raise ValueError(f"the output folder {output} is the input folder; choose another")
    items, ignored = [], []
    names, links, errors = _walk(root, target)
    for id in names:
        path = root / id
        if looks_like_image(path):
            items.append(Item(id=id, source=str(path), output=_output_name(id, suffix, keep_suffix), seed=item_seed(seed, id)))
        else:
            ignored.append(f"{id}: not an image by its name or its first bytes")
    ignored += [f"{id}: a link to a folder, which is not followed" for id in links]
    unreadable = [f"{os.path.relpath(error.filename, root)}: {error.strerror}" for error in errors]
    if not items:
        others = f"; what is there is passed over, such as {ignored[0]}" if ignored else ""
        raise ValueError(f"there are no images in {folder}{others}")
    return check(Plan(items=items, ignored=ignored, unreadable=unreadable), output)


def plan_url(url: str, output: Path, *, seed: int = 0, suffix: str = ".png", keep_suffix: bool = False) -> Plan:
    """All images below a URL, as `plan_folder`; an input is what is named like an image, for a look at its first bytes would cost
    a request each. Ids, and so seeds, are those of the same files in a folder. ValueError too when the URL cannot be listed."""
    items, ignored = [], []
    for id, source in sources.find(url):
        path = PurePosixPath(id)
        if any(part.startswith(".") and part != ".." for part in path.parts):
            continue
        if ".." in path.parts or "\0" in id or "::" in id or not id:  # names in archives are whatever somebody wrote there
            ignored.append(f"{id}: a name that leaves the folder, or cannot be part of a URL")
        elif path.suffix.lower() in _PICTURE_SUFFIXES:
            output_name = _output_name(posixpath.normpath(id), suffix, keep_suffix)
            items.append(Item(id=id, source=source, output=output_name, seed=item_seed(seed, id)))
        else:
            ignored.append(f"{id}: not an image by its name")
    if not items:
        others = f"; what is there is passed over, such as {ignored[0]}" if ignored else ""
        raise ValueError(f"there are no images below {url}{others}")
    return check(Plan(items=items, ignored=ignored), output)


def plan_manifest(
    manifest: Path | str,
    output: Path,
    *,
    seed: int = 0,
    suffix: str = ".png",
    keep_suffix: bool = False,
    allow_urls: Sequence[str] = (),
) -> Plan:
    """The images that a manifest lists, in its order. It is a file or, as str, may be a URL.

    .csv with a header, or .jsonl, with the columns `source` and optionally `output` (a path inside the output folder), `seed`,
    `id` (default: the source as written); .txt has one source a line. Sources are relative to the manifest's folder. Without
    `output` a source keeps its relative path, one from outside that folder its name. A source may be a URL below one of
    `allow_urls`, or below the folder of a manifest that is at a URL. Other arguments as `plan_folder`'s.

    Raises:
        ValueError: a row that cannot be understood, an id twice, two rows with one output; the line tells the row.
    """
    locate = _locator(manifest, allow_urls)
    items = []
    for line, row in _rows(manifest):
        where = f"{manifest}, line {line}"
        if unknown := [str(name) for name in row if name not in COLUMNS + PAIR_COLUMNS]:
            raise ValueError(f"{where}: there is no column {unknown[0]}; columns are {', '.join(COLUMNS)}")
        source = row.get("source")
        if not isinstance(source, str) or not source or "\0" in source:
            raise ValueError(f"{where}: no source; every row needs the path of an image")
        id = str(row.get("id") or source)
        items.append(
            Item(
                id=id,
                source=locate(where, source),
                output=_manifest_output(where, row.get("output"), source, suffix, keep_suffix),
                seed=_manifest_seed(where, row.get("seed"), item_seed(seed, id)),
            )
        )
    if not items:
        raise ValueError(f"{manifest} lists no images")
    return check(Plan(items=items), output)


def _locator(manifest: Path | str, allow_urls: Sequence[str]) -> Callable[[str, str], str]:
    """What makes an absolute path or a URL of a source in a manifest: (where, source) -> source. ValueError for a URL that may
    not be read."""
    base = str(manifest) if sources.is_url(str(manifest)) else None
    folder = os.path.abspath(os.path.dirname(manifest)) if base is None else sources.parent(base)

    def locate(where: str, source: str) -> str:
        source = source if base is not None else sources.local_path(source)
        if not sources.is_url(source):
            if base is None:
                return os.path.normpath(os.path.join(folder, source))
            if source.startswith("/") or ".." in PurePosixPath(source).parts:
                raise ValueError(f"{where}: {source} is outside the folder of the manifest, which is at a URL; give its URL")
            return sources.join(folder, source)
        sources.check_url(source)
        if not sources.is_allowed(source, allow_urls) or (base is not None and not sources.is_url(source.split("::")[-1])):
            start = sources.parent(source.split("::")[-1]) + "/"
            raise ValueError(f"{where}: the URL {source} is read only if it is allowed: add --allow-url {start}")
        return source

    return locate


def check(plan: Plan, output: Path) -> Plan:
    """The plan itself. ValueError when an id or an output occurs twice, or an output would replace an input or another one."""
    if twice := _twice(plan.items, attrgetter("id")):
        raise ValueError(f"{min(twice)} is listed twice; give each row its own id and output")
    if twice := _twice(plan.items, attrgetter("output")):
        doubles: dict[str, list[str]] = {}
        for item in plan.items:
            if item.output in twice:
                doubles.setdefault(item.output, []).append(item.id)
        name, (first, second, *_) = next(iter(doubles.items()))
        others = sum(map(len, doubles.values())) - len(doubles) - 1
        more = f" (and {others} more such pairs)" if others else ""
        raise ValueError(f"{first} and {second} would both become {name}{more}. Use --keep-suffix, or a manifest with outputs")
    folders: set[str] = set()
    for name in {os.path.dirname(item.output) for item in plan.items}:
        while name and name not in folders:
            folders.add(name)
            name = os.path.dirname(name)
    for item in plan.items:
        if item.output in folders:
            raise ValueError(f"{item.id} would be written to {item.output}, which is a folder of other outputs. Rename one")
    # A realpath of every file would ask the disk for each, so of folders, which are few; names are compared in those alone in
    # which there are both inputs and outputs.
    real = functools.cache(os.path.realpath)
    inputs = {real(os.path.dirname(item.source)) for item in plan.items if not sources.is_url(item.source)}
    shared = inputs & {real(os.path.join(output, folder)) for folder in {"", *folders}}
    if shared:
        paths = {
            (real(os.path.dirname(i.source)), os.path.basename(i.source)) for i in plan.items if not sources.is_url(i.source)
        }
        for item in plan.items:
            path = os.path.join(output, item.output)
            if (real(os.path.dirname(path)), os.path.basename(path)) in paths:
                raise ValueError(f"the output of {item.id} would replace the input {path}. Choose another output folder")
    return plan


def _twice(items: Sequence[Item], name: Callable[[Item], str]) -> set[str]:
    """Names that occur more than once. Hashes are compared first: a set of a million names is memory that nothing else needs."""
    hashes = np.fromiter((hash(name(item)) for item in items), dtype=np.int64, count=len(items))
    hashes.sort()
    again = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not again:
        return set()
    return {name for name, count in Counter(n for n in map(name, items) if hash(n) in again).items() if count > 1}


def _walk(root: Path, excluded: Path) -> tuple[list[str], list[str], list[OSError]]:
    """Files and links to folders below root that are not hidden, as sorted relative paths; and what could not be listed."""
    names: list[str] = []
    links: list[str] = []
    errors: list[OSError] = []
    for folder, subfolders, files in os.walk(root, onerror=errors.append):
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else relative.replace(os.sep, "/") + "/"
        names += [prefix + name for name in files if not name.startswith(".")]
        subfolders[:] = [s for s in subfolders if not s.startswith(".") and Path(folder, s).resolve() != excluded]
        links += [prefix + s for s in subfolders if os.path.islink(os.path.join(folder, s))]
    if errors and errors[0].filename == str(root):
        raise errors[0]
    return sorted(names), sorted(links), errors


def _output_name(id: str, suffix: str, keep_suffix: bool) -> str:
    if keep_suffix:
        return id + suffix
    stem, ending = posixpath.splitext(id)
    if ending == suffix:
        return id  # the same string: of a million names, half the memory
    return (stem if ending.lower() in _PICTURE_SUFFIXES else id) + suffix


def _rows(manifest: Path | str) -> Iterable[tuple[int, dict]]:
    """(line number, columns) of each row."""
    line, kind = 0, PurePosixPath(str(manifest).split("::")[0]).suffix.lower()
    try:
        with _opened(manifest) as stream:
            if kind == ".csv":
                reader = csv.DictReader(stream, restkey="(more values than columns)", strict=True)
                for row in reader:
                    yield reader.line_num, row
                return
            for line, text in enumerate(stream, 1):
                text = text.rstrip("\r\n")
                if not text.strip():
                    continue
                row = json.loads(text) if kind == ".jsonl" else {"source": text}
                if not isinstance(row, dict):
                    raise ValueError(f"{manifest}, line {line}: not a JSON object")
                yield line, row
    except UnicodeDecodeError as error:
        raise ValueError(f"{manifest} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{manifest}, line {line}: not JSON ({error.msg})") from error
    except csv.Error as error:
        raise ValueError(f"{manifest}: not a CSV file ({error})") from error


def _opened(manifest: Path | str) -> io.TextIOWrapper:
    if sources.is_url(str(manifest)):
        return sources.open_text(str(manifest))
    return Path(manifest).open(encoding="utf-8-sig", newline="")


def _manifest_output(where: str, output: object, source: str, suffix: str, keep_suffix: bool) -> str:
    if output is None or output == "":
        if sources.is_url(source):
            return _output_name(PurePosixPath(source.split("::")[0].split("?")[0]).name, suffix, keep_suffix)
        path = os.path.normpath(source)
        if path.startswith(("/", "../")):
            path = os.path.basename(path)
        return _output_name(source if path == source else path, suffix, keep_suffix)
    if not isinstance(output, str) or "\0" in output:
        raise ValueError(f"{where}: output is {output!r}; wanted a path")
    path = PurePosixPath(output)
    if path.is_absolute() or ".." in path.parts or WORK_FOLDER in path.parts:
        raise ValueError(f"{where}: output {output} leaves the output folder; wanted a path inside it")
    if not path.suffix:
        return f"{path}{suffix}"
    if path.suffix.lower() not in WRITE_FORMATS:
        raise ValueError(f"{where}: output {output} ends in {path.suffix}; wanted one of {', '.join(WRITE_FORMATS)}")
    return str(path)


def _manifest_seed(where: str, seed: object, default: int) -> int:
    if seed is None or seed == "":
        return default
    if isinstance(seed, str) and seed.strip().isdecimal():
        seed = int(seed)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"{where}: seed is {seed!r}; wanted an integer from 0 to 2**63 - 1")
    return seed
