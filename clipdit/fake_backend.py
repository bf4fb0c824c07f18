"""A backend without a network: for tests, for trying a service or a folder job, and for measuring what everything around a model
costs. Deterministic, exact in any batch, and strict about what it is given.

Its "model" is a straight flow with a closed form. The source latent is the average-pooled image; the picture it is translated to
is that latent inverted and posterised (the goal), with a little of the noise left in so that seeds differ:

    x(t) = (1 - t) noise + t (goal + s noise)          s = SEED_SHARE
    noise = (x - t goal) / (1 - (1 - s) t)             solved for the noise, never singular because s > 0
    velocity(x, t) = goal - (1 - s) noise              constant along the path, so every solver is exact in any number of steps
"""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdit.backend import Condition, Limits, SamplingDefaults
from clipdit.images import to_float, to_u8
from clipdit.sampling import SamplingTable, flow_table
from clipdit.shapes import ImageU8, Latent, Time

SEED_SHARE = 0.1
"""How much of the noise stays in the result: about 6 of 255 levels, one standard deviation."""

LATENT_SCALE = 2.0
"""Pixels in [-1, 1] times this are the latent, which gives a photograph about unit variance."""

Call = Literal["encode", "velocity", "decode"]


class FakeBackend:
    """Translates an image to its coarse negative.

    Args:
        native_size: (height, width), pixels. `downscale`: pixels per latent cell. `max_batch`, `sizes`: see `Limits`.
        delay_s: seconds that each `velocity` call takes longer.
        on_call: called at the start of every call with its name and batch size; may sleep, count, or raise what a real backend
            might (torch.OutOfMemoryError ...).
    """

    name = "fake"
    preference = 0

    def __init__(
        self,
        *,
        native_size: tuple[int, int] = (64, 64),
        downscale: int = 4,
        max_batch: int | None = None,
        sizes: tuple[tuple[int, int], ...] | None = None,
        delay_s: float = 0.0,
        on_call: Callable[[Call, int], None] | None = None,
    ):
        self.limits = Limits(
            device=torch.device("cpu"),
            dtype=torch.float32,
            max_batch=max_batch,
            sizes=sizes,
            multiple=downscale,
            native_size=native_size,
            latent_channels=3,
            downscale=downscale,
        )
        self.defaults = SamplingDefaults(steps=4, guidance=1.0, solver=None)
        self.fingerprint = hashlib.sha256(f"fake {native_size} {downscale}".encode()).hexdigest()
        self._delay_s = delay_s
        self._on_call = on_call
        self._closed = False

    @classmethod
    def why_not(cls, folder: Path) -> None:
        """None: it needs no folder and no device."""

    @classmethod
    def open(cls, folder: Path, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> "FakeBackend":
        """The folder is not looked at. ValueError for a device or dtype other than CPU and float32."""
        if device not in (None, torch.device("cpu")) or dtype not in (None, torch.float32):
            raise ValueError(f"the fake backend runs on cpu in float32; got {device or 'cpu'}, {dtype or 'float32'}")
        return cls()

    def encode(self, source_u8: ImageU8) -> Condition:
        self._begin("encode", source_u8)
        if source_u8.dtype != torch.uint8:
            raise ValueError(f"source is {source_u8.dtype}; wanted uint8 pixels")
        self.limits.check_images(tuple(source_u8.shape))
        pixels = to_float(source_u8)
        patches = F.adaptive_avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)  # (B, 16, 3): means of a 4 x 4 grid
        std, mean = torch.std_mean(pixels, dim=(2, 3), correction=0)
        return Condition(
            tokens=patches,
            pooled=torch.cat([mean, std], dim=1),  # (B, 6)
            latent=LATENT_SCALE * F.avg_pool2d(pixels, self.limits.downscale),
        )

    def velocity(self, x: Latent, t: Time, condition: Condition) -> Latent:
        self._begin("velocity", x)
        time.sleep(self._delay_s)
        if x.shape != condition.latent.shape or t.shape != x.shape[:1]:
            raise ValueError(
                f"x is {tuple(x.shape)}, t is {tuple(t.shape)}; the condition is of latents {tuple(condition.latent.shape)}"
            )
        for name, tensor in (
            ("x", x),
            ("t", t),
            ("latent", condition.latent),
            ("tokens", condition.tokens),
            ("pooled", condition.pooled),
        ):
            if tensor.dtype != torch.float32 or tensor.device != self.limits.device or len(tensor) != len(x):
                raise ValueError(
                    f"{name} is {tensor.dtype}, batch {len(tensor)}, on {tensor.device}; wanted float32, batch {len(x)}, on cpu"
                )
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity")
        if t.min() < 0 or t.max() > 1:
            raise ValueError(f"t runs from {t.min():g} to {t.max():g}; wanted 0 to 1")
        t = t[:, None, None, None]
        goal = -condition.latent.round()
        noise = (x - t * goal) / (1 - (1 - SEED_SHARE) * t)
        return goal - (1 - SEED_SHARE) * noise

    def decode(self, latent: Latent) -> ImageU8:
        self._begin("decode", latent)
        batch, _, height, width = latent.shape
        scale = self.limits.downscale
        self.limits.check_images((batch, 3, height * scale, width * scale))
        if not latent.isfinite().all():
            raise ValueError("latent holds NaN or infinity")
        return to_u8(F.interpolate(latent / LATENT_SCALE, scale_factor=scale, mode="nearest"))

    def table(self, steps: int, solver: str | None = None) -> SamplingTable:
        return flow_table(steps, solver or "euler")

    def close(self) -> None:
        self._closed = True

    def _begin(self, call: Call, batch: Tensor) -> None:
        if self._closed:
            raise RuntimeError(f"{call} was called on a backend that is closed")
        if self._on_call is not None:
            self._on_call(call, len(batch))
