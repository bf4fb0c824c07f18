"""Checkpoint folder -> bundle folder: graphs in every precision that was asked for, engines, and what was measured of them."""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from clipdit.files import naming
from clipdit.pipeline import ClipDiTPipeline, load_checkpoint
from clipdit.torch_backend import checkpoint_fingerprint
from clipdit_export import pictures
from clipdit_export.assembly import KEY_FILE, Assembly
from clipdit_export.cache_key import cache_key, what_changed
from clipdit_export.manifest import MANIFEST_FILE, Manifest, check_file, read_manifest
from clipdit_export.order import Order

logger = logging.getLogger(__name__)


def build(checkpoint: Path, out: Path, order: Order | None = None, *, force: bool = False) -> Manifest:
    """Export `checkpoint` to the bundle folder `out`, whole or not at all.

    Nothing is done when `out` is what this order would make already (`force` builds it all the same). Engines of a build that was
    interrupted are taken over by the next one of the same order.

    Raises ValueError, one line: a damaged checkpoint, a size that its networks cannot take, pairs that are none, an engine that
    cannot be built here, a precision that is not there afterwards, or `out` is there and is no bundle.
    """
    order = order or Order()
    pipeline = load_checkpoint(checkpoint)
    for module in (pipeline.transformer, pipeline.vae, pipeline.image_encoder):
        if module is not None:
            module.requires_grad_(False)
    sizes = [pipeline.native_size] if order.sizes is None else list(dict.fromkeys(order.sizes))
    _check_sizes(pipeline, sizes)
    if out.exists() and not (out / MANIFEST_FILE).exists():
        raise ValueError(f"{out} is there already, and is no bundle; give a new folder")
    size = pipeline.native_size if pipeline.native_size in sizes else sizes[0]
    count = order.images
    seen = pictures.from_pairs(order.calibration, size, count) if order.calibration else pictures.from_samples(size, count)
    fingerprint = checkpoint_fingerprint(checkpoint)
    key = cache_key(fingerprint, order, seen)
    if not force and (done := _is_done(out, key)) is not None:
        return done
    part = out.with_name(f".{out.name}.part")
    with naming(out):
        _begin(part, key)
        try:
            manifest = Assembly(part, pipeline, fingerprint, out.name, order, seen, size, key).run(sizes)
            _put_in_place(part, out)
        except Exception:  # but not when a person or the system ends it: the next build takes the engines over
            shutil.rmtree(part, ignore_errors=True)
            raise
    return manifest


def _is_done(out: Path, key: dict[str, str]) -> Manifest | None:
    """The bundle in `out`, when it is whole and of this key; why it is built again is logged."""
    try:
        manifest = read_manifest(out)
        for name in manifest.files:
            check_file(out, name, manifest)
    except ValueError as error:
        if out.exists():
            logger.info("building again: %s", error)
        return None
    changes = what_changed(manifest.key, key)
    if changes:
        logger.info("building again: %s", "; ".join(changes))
        return None
    logger.info("%s is up to date; --force builds it again", out)
    return manifest


def _begin(part: Path, key: dict[str, str]) -> None:
    """An empty folder to build in, but for the engines of an interrupted build of the same key."""
    try:
        same = json.loads((part / KEY_FILE).read_bytes()) == key
    except (OSError, ValueError):
        same = False
    for path in part.iterdir() if part.exists() else ():
        if not same or path.name != "engines":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    part.mkdir(parents=True, exist_ok=True)
    (part / KEY_FILE).write_text(json.dumps(key), encoding="utf-8")


def _check_sizes(pipeline: ClipDiTPipeline, sizes: Sequence[tuple[int, int]]) -> None:
    multiple = pipeline.autoencoder.downscale * pipeline.transformer.config["patch"]
    for height, width in sizes:
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise ValueError(f"size {width} x {height} cannot be exported; both sides must be multiples of {multiple}")


def _put_in_place(part: Path, out: Path) -> None:
    """The new folder takes the place of the old one; between the two renames there is none, never a mixed one."""
    old = out.with_name(f".{out.name}.old.part")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(part, out)
    shutil.rmtree(old, ignore_errors=True)
