"""The seam: whatever can translate images answers these few questions, and nobody above asks which one it is.

A backend owns the networks of one checkpoint or bundle on one device. Everything that depends on the source alone
(keys and values of cross-attention) or on the schedule alone (adaLN modulation) is its own business.
"""

import logging
import math
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from clipdit.archives import ENDING as ARCHIVE_ENDING
from clipdit.archives import unpacked
from clipdit.shapes import ClipEmbedding, ClipTokens, ImageU8, Latent, Time

if TYPE_CHECKING:
    from clipdit.sampling import SamplingTable

logger = logging.getLogger(__name__)

GROUP = "clipdit.backends"
"""Entry points of this group are the backends that exist: classes that answer `BackendClass`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """What the network is told of the source. Computed once per image, constant over the loop.

    Compared by identity: a backend keeps what it derives from a condition (keys, values) for as long as the caller keeps it.
    """

    tokens: ClipTokens
    """CLIP patch tokens of the source, (B, M, E)."""
    pooled: ClipEmbedding
    """CLIP embedding of the source, (B, P)."""
    latent: Latent
    """Standardised VAE latent of the source, (B, C, h, w)."""

    def map(self, function) -> "Condition":
        """The same condition with `function` applied to each tensor."""
        return type(self)(**{f.name: function(getattr(self, f.name)) for f in fields(self)})

    def null(self) -> "Condition":
        """The condition that says nothing: zeros. Training drops the source to this; guidance subtracts it."""
        return self.map(torch.zeros_like)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a backend can take."""

    device: torch.device
    dtype: torch.dtype
    max_batch: int | None
    """Images in one call; None is any number."""
    sizes: tuple[tuple[int, int], ...] | None
    """The (height, width) pairs it serves, pixels; None is any multiple of `multiple`."""
    multiple: int
    """Height and width must be multiples of this many pixels."""
    native_size: tuple[int, int]
    """(height, width) the checkpoint was trained at; what inputs are fitted to when nobody says otherwise."""
    latent_channels: int
    downscale: int
    """Pixels per latent cell along one side."""
    guidable: bool = True
    """Whether guidance means anything: the network has learnt what it says without a source."""

    def check_images(self, shape: tuple[int, ...]) -> None:
        """ValueError when a (B, 3, H, W) batch of this shape cannot be served."""
        if len(shape) != 4 or shape[1] != 3:
            raise ValueError(f"images have shape {tuple(shape)}; wanted (B, 3, H, W)")
        batch, _, height, width = shape
        if self.max_batch is not None and batch > self.max_batch:
            raise ValueError(f"{batch} images in one call; this backend takes at most {self.max_batch}. Use a smaller batch size")
        if self.sizes is not None and (height, width) not in self.sizes:
            names = ", ".join(f"{w} x {h}" for h, w in self.sizes)
            raise ValueError(f"image is {width} x {height}; this backend takes {names}. Resize, or export with that size")
        if height % self.multiple or width % self.multiple or not height or not width:
            raise ValueError(f"image is {width} x {height}; both sides must be multiples of {self.multiple}. Resize or pad it")

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width), pixels, of what this backend takes, in which an image of this size leaves least of the canvas empty;
        of several, the one that scales it least. Where any size is taken, its own, brought up to the next multiple."""
        if self.sizes is None:
            return math.ceil(height / self.multiple) * self.multiple, math.ceil(width / self.multiple) * self.multiple

        def loss(size: tuple[int, int]) -> tuple[float, float]:
            scale = min(size[0] / height, size[1] / width)
            empty = 1 - scale**2 * height * width / (size[0] * size[1])
            return round(empty, 2), abs(math.log(scale))  # a hundredth of the canvas is less than any change of scale

        return min(self.sizes, key=loss)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of an image of this size, pixels."""
        return (self.latent_channels, height // self.downscale, width // self.downscale)


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """How a checkpoint is sampled when nobody says otherwise."""

    steps: int
    guidance: float
    """Scale of classifier-free guidance; 1 is none, at half the cost."""
    solver: str | None
    """A solver's name; None is the first choice of the checkpoint's objective."""


@runtime_checkable
class Backend(Protocol):
    """Promises, tested for every backend in tests/contract: shapes and dtypes; finite; agrees with eager; image i depends on
    (source i, seed i) only; inputs unchanged; a clear error after `close`. One thread calls it at a time."""

    name: str
    """What `open_backend` calls it."""
    limits: Limits
    defaults: SamplingDefaults

    @property
    def fingerprint(self) -> str:
        """Same weights and configuration, same fingerprint. A resumed job and a cache ask for it."""
        ...

    def encode(self, source_u8: ImageU8) -> Condition:
        """uint8 (B, 3, H, W) -> Condition, on the backend's device."""
        ...

    def velocity(self, x: Latent, t: Time, condition: Condition) -> Latent:
        """The network's prediction at (x, t), same shape as x. Its meaning (velocity or noise) belongs to the sampling table."""
        ...

    def decode(self, latent: Latent) -> ImageU8:
        """Standardised latent (B, C, h, w) -> uint8 (B, 3, H, W). ValueError for NaN, which would come out as black."""
        ...

    def table(self, steps: int, solver: str | None = None) -> "SamplingTable":
        """The coefficients of `steps` steps of `solver` (None: the checkpoint's own) for what this network predicts."""
        ...

    def close(self) -> None:
        """Release the device's memory. Any later call raises RuntimeError."""
        ...


@runtime_checkable
class WholeLoop(Protocol):
    """What a backend may also offer: the loop of `clipdit.sampling.sample` in one call, such as a CUDA graph."""

    def sample(self, noise: Latent, condition: Condition, table: "SamplingTable", *, guidance: float = 1.0) -> Latent:
        """The end of the guided loop over `table` from `noise`, without noise inside the loop."""
        ...


@runtime_checkable
class OneCall(Protocol):
    """What a backend may also offer: a whole translation in one call, from pixels to pixels, for some tables."""

    def is_one_call(self, size: tuple[int, int], table: "SamplingTable", guidance: float) -> bool:
        """Whether `translate` can be called for images of this (height, width)."""
        ...

    def translate(self, source_u8: ImageU8, noise: Latent, table: "SamplingTable", *, guidance: float = 1.0) -> ImageU8:
        """uint8 (B, 3, H, W) -> uint8 (B, 3, H, W). ValueError for NaN, as `decode`."""
        ...


@runtime_checkable
class OfVariants(Protocol):
    """What the class of a backend may also offer: several ways to run one folder, such as fp32 and int8. `open` then takes
    `variant=NAME`."""

    def variants(self, folder: Path) -> list[str]:
        """Those that it can open, the best first."""
        ...


@runtime_checkable
class BackendClass(Protocol):
    """What stands behind an entry point of the group `clipdit.backends`: a class, of which these are class methods."""

    preference: int
    """Among those that can open a folder the highest is taken; 0 is only ever opened by name."""

    def why_not(self, folder: Path) -> str | None:
        """Why this backend cannot open the folder on this machine, one line that ends in what to do; None when it can. Cheap:
        looks at the folder's JSON and at what is installed, loads no weights."""
        ...

    def open(self, folder: Path, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Backend:
        """Load the folder. None leaves the choice of device or dtype to the backend. ValueError for a damaged folder."""
        ...


def builtin_checkpoint() -> Path:
    """The folder of the checkpoint that comes with the package: line drawings to emoji, 128 x 128."""
    return Path(str(files("clipdit") / "assets" / "edges2emoji"))


BUILT_IN = "built-in"
"""How a user names that checkpoint, its VAE or its CLIP."""


def locate(name: str) -> str:
    """A checkpoint, bundle, VAE or CLIP as the user names it: a folder, a .zip file of one, or a hub id; "built-in" is the
    package's own.

    ValueError where an installation has none, or an archive is damaged."""
    if name != BUILT_IN:
        archive = Path(name)
        return str(unpacked(archive)) if archive.suffix == ARCHIVE_ENDING and archive.is_file() else name
    folder = builtin_checkpoint()
    if not (folder / "model_index.json").exists():
        raise ValueError("this installation has no built-in checkpoint; name another, by folder or hub id")
    return str(folder)


def available_backends(folder: Path | str | None = None, *, unasked: bool = False) -> dict[str, str | None]:
    """Every installed backend by name, the preferred first: None when it can open this folder here, else the reason why not.

    With `unasked` only those that `open_backend` takes without being given their name."""
    folder = _as_folder(folder)
    classes, missing = _classes()
    return {name: b.why_not(folder) for name, b in classes.items() if b.preference > 0 or not unasked} | missing


def open_backend(
    folder: Path | str | None = None,
    name: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Backend:
    """Open a checkpoint or a bundle: the only place where a backend is chosen.

    Args:
        folder: a checkpoint or bundle folder, or what a backend takes for one (a hub id); None is the built-in checkpoint.
        name: an entry point of the group `clipdit.backends`; None is the preferred one of those that can open the folder here.
            "NAME:VARIANT" is one of the variants that a bundle holds.
        device, dtype: None leaves the choice to the backend; `limits` tells what it chose.

    Raises:
        ValueError: no such backend, or it cannot open this folder here; the line says why.
    """
    folder = _as_folder(folder)
    try:
        device = None if device is None else torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device}; wanted cpu, cuda, cuda:1 ...") from error
    name, _, variant = (name or "").partition(":")
    classes, reasons = _classes(name or None)
    for candidate, backend in classes.items():
        if not name and backend.preference <= 0:
            continue
        reason = backend.why_not(folder)
        if reason is None:
            if variant and not isinstance(backend, OfVariants):
                raise ValueError(f"the {candidate} backend has no variants; use --backend {candidate}")
            opened = backend.open(folder, device=device, dtype=dtype, **({"variant": variant} if variant else {}))
            dtype_name = str(opened.limits.dtype).removeprefix("torch.")
            logger.info("%s on the %s backend, %s, %s", folder, candidate, opened.limits.device, dtype_name)
            return opened
        reasons[candidate] = reason
    if len(set(reasons.values())) == 1:  # the folder is at fault, and each backend says so
        raise ValueError(next(iter(reasons.values())))
    raise ValueError("; ".join(f"the {n} backend cannot be used: {reason}" for n, reason in reasons.items()))


def backend_class(name: str) -> BackendClass:
    """The class behind a name. ValueError for a name that is unknown, or whose package is not installed."""
    classes, missing = _classes(name)
    if name in missing:
        raise ValueError(f"the {name} backend cannot be used: {missing[name]}")
    return classes[name]


def _as_folder(folder: Path | str | None) -> Path:
    return builtin_checkpoint() if folder is None else Path(locate(str(folder)))


def _classes(name: str | None = None) -> tuple[dict[str, BackendClass], dict[str, str]]:
    """The backends of this name or all, the preferred first; and why those are missing whose package is not installed."""
    entries = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name is not None and name not in entries:
        raise ValueError(f"there is no backend {name}; there are {', '.join(sorted(entries))}")
    classes, missing = {}, {}
    for candidate in sorted(entries) if name is None else [name]:
        try:
            classes[candidate] = entries[candidate].load()
        except ModuleNotFoundError as error:
            missing[candidate] = f"it needs the Python package {error.name}, which is not installed"
    return dict(sorted(classes.items(), key=lambda item: -item[1].preference)), missing
