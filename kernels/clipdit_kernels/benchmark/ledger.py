"""The record of a measurement: which kernels, on which machine, with which versions, and what was found.

Records that are worth keeping lie in the package (KEPT), so that whoever has no GPU at hand still sees the last real numbers, and
whether the kernels are still those that were measured.
"""

import ast
import hashlib
import io
import json
import logging
import tokenize
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from clipdit.files import write_atomically
from clipdit.provenance import provenance

logger = logging.getLogger(__name__)

FORMAT = "clipdit-kernels-1"
SOURCES = Path(__file__).parents[1]
KEPT = Path(str(files("clipdit_kernels"))) / "ledger"

Record = dict[str, Any]


def source_hash() -> str:
    """SHA-256 over the code of the kernels and of what launches them: not over what measures them, and not over comments,
    docstrings and empty lines, in which a measurement may be written down without making it stale."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.py")):
        digest.update(f"{path.name} {hashlib.sha256(_code(path.read_text(encoding='utf-8')).encode()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _code(source: str) -> str:
    """A module as it is written, without comments, strings that stand alone, and empty lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert node.end_lineno is not None
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def begin(kind: str, device: torch.device, protocol: Record, *, out: Path | None = None) -> Record:
    """A record of kind "kernels" or "sampling" without entries; or with those of `out`, when it was made by the same kernels with
    the same protocol, versions and hardware: so that a run that was cut off goes on."""
    here = provenance()
    fresh = {
        "format": FORMAT,
        "kind": kind,
        "source": source_hash(),
        "provenance": here,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "triton": _version_of_triton(),
        "protocol": protocol,
        "entries": [],
    }
    if out is None or not out.exists():
        return fresh
    before = read(out)
    same = all(before.get(name) == fresh[name] for name in ("kind", "source", "device", "triton", "protocol"))
    if not same or before["provenance"]["versions"] != here["versions"]:
        logger.warning("%s was made by other kernels, another machine or another protocol; it will be written anew", out)
        return fresh
    logger.info("%s holds %d of the cases already", out, len(before["entries"]))
    return fresh | {name: before[name] for name in ("entries", "ceilings") if name in before}


def write(record: Record, out: Path) -> None:
    write_atomically(out, json.dumps(record, indent=1) + "\n")


def read(path: Path) -> Record:
    """ValueError, one line, for a file that is no record."""
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is no record of `clipdit bench kernels` or `clipdit bench sampling`")
    return record


def kept(kind: str) -> list[Record]:
    """The last records of this kind that came with the package, `<kind>.json` first, then `<kind>-<what is special>.json`."""
    return [read(path) for path in sorted(KEPT.glob(f"{kind}*.json"), key=lambda path: path.stem)]


def stale(record: Record) -> bool:
    """Whether the kernels have changed since."""
    return record["source"] != source_hash()


def _version_of_triton() -> str:
    import triton

    return triton.__version__
