"""What is done to one input or one batch, whichever engine does it: read, translate, write. Nothing here knows of threads, other
processes or the ledger; a bad input becomes a record with its reason, never an exception.
"""

import errno
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from clipdit.backend import Limits
from clipdit.images import WRITE_FORMATS, DecodedImage, Fit, ImageError, Placement, decode_image, encode_image
from clipdit.offline.folder import JobFolder, Record
from clipdit.offline.plan import Item
from clipdit.offline.sources import fetch, is_url
from clipdit.translator import Sampling, Size, Translator, fit_within

IMAGE_ERRORS = (ValueError, RuntimeError, MemoryError)
"""What decoding, resizing and encoding raise over one odd image; PyTorch's own is RuntimeError."""

_NAME_ERRORS = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EILSEQ, errno.EINVAL}
"""Errors of one output's name. Other errors in writing would meet every output, so they stop the job."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an engine does to every input of a job."""

    folder: JobFolder
    """Opened by the job. Engines write images to it, the job alone its ledger."""
    limits: Limits
    """Of the model's backend."""
    size: Size
    fit: Fit
    sampling: Sampling
    batch_size: int
    """Images in one call, at most; halved when memory runs out."""
    workers: int
    """Threads that read and write, where the engine has threads."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ready:
    """An input on its way to the model."""

    item: Item
    image: UInt8[Tensor, "3 H W"]
    """Fitted."""
    placement: Placement
    notes: tuple[str, ...]
    ms: float


def read(item: Item, work: Work) -> Ready | Record:
    """An input, decoded and fitted; a quarantined record where that cannot be."""
    start_s = time.perf_counter()
    try:
        decoded: DecodedImage = decode_image(fetch(item.source) if is_url(item.source) else item.source)
        image, placement = fit_within(work.limits, decoded.pixels, work.size, work.fit)
    except IMAGE_ERRORS as error:
        reason = error.reason if isinstance(error, ImageError) else str(error) or type(error).__name__
        return quarantine(item, reason, ms_since(start_s))
    return Ready(item=item, image=image, placement=placement, notes=decoded.notes, ms=ms_since(start_s))


class Halving:
    """Calls a translator with as many images as memory allows. `batch_size` is what it has come to."""

    def __init__(self, translator: Translator, sampling: Sampling, batch_size: int, on_halved: Callable[[int, int], None]):
        self.translator, self.sampling, self.batch_size, self.on_halved = translator, sampling, batch_size, on_halved

    def __call__(self, images: Sequence[UInt8[Tensor, "3 H W"]], seeds: Sequence[int]) -> list[tuple[Tensor | None, float]]:
        """(output, milliseconds) of each image of a group of equal size; None for an output for which there is no memory even
        alone."""
        results: list[tuple[Tensor | None, float]] = []
        while (start := len(results)) < len(images):
            chunk = images[start : start + self.batch_size]
            start_s = time.perf_counter()
            outputs = self._translate(chunk, seeds[start : start + len(chunk)])
            if outputs is not None:
                results += [(output, ms_since(start_s) / len(chunk)) for output in outputs]
            elif len(chunk) == 1:
                results.append((None, ms_since(start_s)))
            else:
                self.batch_size = len(chunk) // 2
                self.on_halved(len(chunk), self.batch_size)
        return results

    def _translate(self, chunk: Sequence[Tensor], seeds: Sequence[int]) -> Tensor | None:
        """None when there is not enough memory. In a method of its own: the error's traceback would keep the tensors alive."""
        try:
            return self.translator(torch.stack(list(chunk)), seeds=seeds, **self.sampling)
        except (RuntimeError, MemoryError) as error:
            # PyTorch's CPU allocator raises a plain RuntimeError
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def write(
    item: Item, placement: Placement, notes: tuple[str, ...], output: UInt8[Tensor, "3 H W"] | None, ms: float, folder: JobFolder
) -> Record:
    """Bring a result back to its input's size and put it in its place; None is a result for which memory did not suffice.

    OSError where no output at all could be written: a full disk, a folder that is read-only or gone."""
    start_s = time.perf_counter()
    if output is None:
        height, width = placement.size
        return quarantine(item, f"not enough memory for one image of {width} x {height}", ms)
    path = folder.path / item.output
    try:
        data = encode_image(placement.restore(output), WRITE_FORMATS[path.suffix.lower()])
    except (*IMAGE_ERRORS, OSError) as error:  # a format's largest side, mostly
        return quarantine(item, f"the result cannot be encoded as {path.suffix[1:]}: {error}", ms + ms_since(start_s))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = folder.write_file(path, data)
    except OSError as error:
        if error.errno not in _NAME_ERRORS:
            raise
        return quarantine(item, f"the output cannot be written: {error.strerror}", ms + ms_since(start_s))
    return Record(
        id=item.id,
        input=item.source,
        output=item.output,
        status="written",
        reason=None,
        sha256=digest,
        seed=item.seed,
        notes=notes,
        ms=round(ms + ms_since(start_s), 3),
    )


def quarantine(item: Item, reason: str, ms: float) -> Record:
    """The record of an input that is given up, with its reason on one line."""
    return Record(
        id=item.id,
        input=item.source,
        output=None,
        status="quarantined",
        reason=" ".join(reason.split()),
        sha256=None,
        seed=item.seed,
        ms=round(ms, 3),
    )


def ms_since(start_s: float) -> float:
    return 1000 * (time.perf_counter() - start_s)
