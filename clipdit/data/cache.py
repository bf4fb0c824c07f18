"""Latents and CLIP features of every pair, computed once: during training the VAE and CLIP are not run at all.

The cache is a folder of plain .npy files, read by memory map, so it may be larger than memory. Its name is a hash of all
that it was computed from (pixels' files, VAE, CLIP, size, augmentation); a folder of another hash is simply another cache.
Augmentation happens before encoding: each pair has `views`, of which the first is the pair as it is.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Int
from numpy.lib.format import open_memmap
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from clipdit.backend import Condition
from clipdit.data.augment import Augment, view
from clipdit.data.layouts import Pair
from clipdit.files import naming
from clipdit.images import to_float
from clipdit.model.autoencoder import Autoencoder, is_of_decoder
from clipdit.model.clip import ClipImageEncoder
from clipdit.model.network import Network
from clipdit.train.task import Batch

logger = logging.getLogger(__name__)
PARTS = ("target", "source", "tokens", "pooled", "target_tokens")

FORMAT = 1
"""Part of the hash; raised whenever the same input would give other rows."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of the target latents, by channel."""

    mean: list[float]
    std: list[float]


class LatentCache:
    """Rows of target latent, source latent, CLIP tokens and CLIP embedding of the source (absent without CLIP), and of the target
    (where they were asked for), float16.

    Row `pair * views + view`; latents as the VAE has them, not standardised."""

    def __init__(self, folder: Path):
        """ValueError when `folder` is damaged."""
        self.folder = folder
        try:
            self.about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
            self.views: int = self.about["views"]
            self.pairs: int = self.about["pairs"]
            statistics = Statistics(**self.about["statistics"])
            self._parts = {p: np.load(folder / f"{p}.npy", mmap_mode="r") for p in PARTS if (folder / f"{p}.npy").exists()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the cache {folder} is damaged ({error}); delete that folder, and it is made again") from error
        self.standardise_by(statistics)

    def standardise_by(self, statistics: Statistics) -> None:
        """From now on latents come standardised by these, which a network learnt to read, and not by those of these targets."""
        self.statistics = statistics
        self._mean = torch.tensor(statistics.mean).reshape(1, -1, 1, 1)
        self._std = torch.tensor(statistics.std).reshape(1, -1, 1, 1)

    def rows(self, indices: Int[np.ndarray, "B"]) -> Batch:
        """Rows as float32 tensors, latents standardised: target and source (B, C, h, w), tokens and target_tokens (B, M, E),
        pooled (B, P)."""
        batch = {name: torch.from_numpy(part[indices].astype(np.float32)) for name, part in self._parts.items()}
        for name in ("target", "source"):
            batch[name] = (batch[name] - self._mean) / self._std
        return batch

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self._parts.values())


def condition_of(batch: Batch, dit: Network) -> Condition:
    """The condition in a cached batch; without CLIP its two parts are empty."""
    latent, config = batch["source"], dict(dit.config)
    tokens = batch["tokens"] if "tokens" in batch else latent.new_zeros(len(latent), 0, config["clip_token_width"])
    pooled = batch["pooled"] if "pooled" in batch else latent.new_zeros(len(latent), config["clip_embedding_width"])
    return Condition(tokens=tokens, pooled=pooled, latent=latent)


def fingerprint(module: torch.nn.Module | None, leaving_out: Callable[[str], bool] = lambda name: False) -> str:
    """A hash of a network: its configuration, as far as it says what is computed, and its weights, without those that are to be
    left out by name."""
    digest = hashlib.sha256()
    if module is None:
        return digest.hexdigest()
    config = getattr(module, "config", {})
    plain = config.to_dict() if isinstance(config, PretrainedConfig) else dict(config)
    told = {k: v for k, v in plain.items() if not k.startswith("_") and k not in ("transformers_version", "dtype", "torch_dtype")}
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        if leaving_out(name):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def build_cache(
    folder: Path,
    pairs: Sequence[Pair],
    autoencoder: Autoencoder,
    clip: ClipImageEncoder | None,
    settings: Augment,
    *,
    size: tuple[int, int],
    of_targets: bool = False,
    batch_size: int = 32,
) -> LatentCache:
    """The cache of these pairs below `folder`; computed if it is not there, whole or not at all. One process computes in a
    folder at a time; others wait for it.

    `of_targets`: with CLIP's tokens of the targets. `autoencoder` must not standardise yet: its statistics are what is measured
    here. ValueError when there are no pairs, OSError when the disk is too small.
    """
    if not pairs:
        raise ValueError("there are no pairs in this split; see `clipdit data check` for what was found")
    views = settings.views
    key = {
        "format": FORMAT,
        "files": [[p.id, str(p.source_half), *_stamp(p.source), *_stamp(p.target)] for p in pairs],
        "vae": fingerprint(autoencoder.vae, leaving_out=is_of_decoder),
        "clip": fingerprint(clip.model if clip else None),
        "size": size,
        "augment": asdict(settings),
    } | ({"of_targets": True} if of_targets else {})
    cache = folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    if (cache / "about.json").exists():
        logger.info("using the cache %s", cache)
        return LatentCache(cache)

    def fill(part: Path) -> None:
        _fill(part, pairs, autoencoder, clip, settings, size, batch_size, views, of_targets)

    _make(cache, fill)
    made = LatentCache(cache)
    logger.info("cached %d pairs x %d views, %.0f MB, in %s", len(pairs), views, made.bytes / 1e6, cache)
    return made


def _make(cache: Path, fill: Callable[[Path], None]) -> None:
    """`fill` a folder, then give it its name. What a killed process left is removed: the lock says that nobody works on it."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache.parent / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process that is filling a cache in %s", cache.parent)
        lock.acquire()
    try:
        if (cache / "about.json").exists():  # made while we waited
            return
        for left in [*cache.parent.glob(".*.part"), cache]:
            shutil.rmtree(left, ignore_errors=True)
        part = cache.with_name(f".{cache.name}.part")
        try:
            with naming(cache):
                part.mkdir()
                fill(part)
                os.replace(part, cache)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    finally:
        lock.release()


def _new_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A float16 array on the disk, whose space is taken now: writing to a memory map on a full disk would kill the process."""
    array = open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _stamp(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def _fill(
    part: Path,
    pairs: Sequence[Pair],
    autoencoder: Autoencoder,
    clip: ClipImageEncoder | None,
    settings: Augment,
    size: tuple[int, int],
    batch_size: int,
    views: int,
    of_targets: bool,
) -> None:
    device = next(autoencoder.parameters()).device
    total = len(pairs) * views
    cells = (autoencoder.latent_channels, size[0] // autoencoder.downscale, size[1] // autoencoder.downscale)
    shapes = {"target": cells, "source": cells}
    if clip is not None:
        shapes |= {"tokens": (clip.tokens, clip.token_width), "pooled": (clip.embedding_width,)}
        shapes |= {"target_tokens": (clip.tokens, clip.token_width)} if of_targets else {}
    arrays = {name: _new_array(part / f"{name}.npy", (total, *shape)) for name, shape in shapes.items()}
    sums, decoded = torch.zeros(2, cells[0], dtype=torch.float64), None
    logger.info("caching the latents of %d pairs x %d views, once for all trainings on them", len(pairs), views)
    with tqdm(total=total, desc="caching latents", unit="image", disable=None) as bar:
        for start in range(0, total, batch_size):
            images = []
            for row in range(start, min(start + batch_size, total)):
                pair = pairs[row // views]
                if row % views == 0 or decoded is None:  # a pair's views follow one another: its files are read once
                    decoded = pair.read(size)
                images.append(torch.stack(view(*decoded, settings, pair.id, row % views)))
            source, target = to_float(torch.stack(images).to(device)).unbind(1)
            end = start + len(images)
            latents = {"target": autoencoder.encode(target).float().cpu(), "source": autoencoder.encode(source).float().cpu()}
            for name, latent in latents.items():
                arrays[name][start:end] = latent.numpy()
            sums += torch.stack((latents["target"].double().sum((0, 2, 3)), latents["target"].double().square().sum((0, 2, 3))))
            if clip is not None:
                tokens, pooled = clip(source)
                arrays["tokens"][start:end], arrays["pooled"][start:end] = tokens.cpu().numpy(), pooled.cpu().numpy()
            if clip is not None and of_targets:
                arrays["target_tokens"][start:end] = clip(target)[0].cpu().numpy()
            bar.update(len(images))
    for array in arrays.values():
        array.flush()
    mean, square = sums / (total * cells[1] * cells[2])
    std = (square - mean.square()).clamp(min=1e-8).sqrt()
    about = {"pairs": len(pairs), "views": views, "statistics": asdict(Statistics(mean=mean.tolist(), std=std.tolist()))}
    (part / "about.json").write_text(json.dumps(about), encoding="utf-8")
