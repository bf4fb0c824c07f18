"""Inputs of an offline job, and what it left behind."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def draw(path: Path, height: int = 40, width: int = 60, seed: int = 0) -> None:
    """A picture of coloured blocks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST).save(path)


def contents(folder: Path) -> dict[str, bytes]:
    """Every image below a folder, by relative path."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.*")) if p.suffix in (".png", ".webp")
    }


def ledger(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
