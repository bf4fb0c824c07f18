"""What whoever starts the service decides. Every number here has a unit and a reason."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # they bring PyTorch, and Ray's proxy has a use for numbers alone
    from clipdit.images import Fit
    from clipdit.translator import Size

FORMATS = ("PNG", "JPEG", "WEBP")
"""Uploads that are taken, as Pillow names them: of its decoders the three with the most eyes on them. The other formats had most
of its security reports."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of the service, checked when made."""

    model_name: str = "clipdit"
    """What callers name the model; the answer to `GET /v1/models`."""
    api_key: str | None = None
    """What callers send as `Authorization: Bearer KEY`; None leaves every route open."""

    max_batch: int = 8
    """Images in one call of the model; less where the backend takes less."""
    max_wait_ms: float = 5.0
    """How long the first image of a batch waits for others, milliseconds; 0 takes what is there."""
    pad_batches: bool | None = None
    """Bring every batch to a power of two by repeating an image. None: on CUDA, where each number of images is a
    graph or a choice of kernels of its own."""
    queue: int = 64
    """Requests that may wait beside the batch that runs."""
    timeout_s: float = 60.0
    """From a whole body to an answer, seconds."""
    hang_s: float = 3.0
    """A batch that takes longer than this, and than ten times what such a batch took before, counts as hanging, seconds."""
    size: Size = None
    """What images are fitted to; None is the size the checkpoint was trained at."""
    fit: Fit = "pad"
    """How; see `clipdit.images.fit`."""

    max_body_bytes: int = 20 * 2**20
    """Of a request."""
    max_bodies_bytes: int = 2**29
    """Of all requests that are being read or decoded, together: a bound on memory, whatever callers do."""
    body_timeout_s: float = 30.0
    """In which a body must have arrived, seconds: a slow one holds memory."""
    max_pixels: int = 16_000_000
    """Of an upload, by its header."""
    max_side: int = 16_384
    """Of an upload, pixels: what is longer and thinner than this is no picture, but expensive."""
    decode_timeout_s: float = 5.0
    """In which an upload must be decoded, seconds; its process is killed then."""
    decode_memory_bytes: int = 2**30
    """Address space a decoding process may add to what it starts with. 16 million pixels need about a third."""
    decode_processes: int = 2
    """Uploads decoded at the same time."""
    max_steps: int = 200
    """Solver steps that a caller may ask for."""

    max_jobs: int = 256
    """Jobs that are kept, those that wait or run included; 0 leaves the routes of jobs out."""
    max_jobs_bytes: int = 2**28
    """Pixels of all jobs together: what a finished one keeps is of the model's size, and that may be the upload's."""
    job_keep_s: float = 600.0
    """How long a finished job is kept, seconds."""

    def __post_init__(self) -> None:
        positive = (
            "max_batch queue timeout_s hang_s max_body_bytes max_bodies_bytes body_timeout_s max_pixels max_side decode_timeout_s"
            " decode_memory_bytes decode_processes max_steps max_jobs_bytes job_keep_s"
        ).split()
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted more than 0")
        for name in ("max_wait_ms", "max_jobs"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted 0 or more")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key.strip()):
            raise ValueError("the API key holds characters that a header cannot carry, or none; wanted printable ASCII")


def check_bind(host: str, settings: ServeSettings, *, insecure: bool) -> None:
    """ValueError when others than this machine could reach the service and it asks for no key."""
    if settings.api_key is None and not insecure and not _is_loopback(host):
        raise ValueError(
            f"--host {host} lets others in, and no key is set. Set CLIPDIT_API_KEY, bind to 127.0.0.1, or say --insecure"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: whoever resolves it decides where it leads
        return False
