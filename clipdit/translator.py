"""Images in, images out, on whichever backend: the one way from pixels to pixels.

    uint8 sources == one upload ==> encode (once per image)
    seeds -> noise -> the loop over the sampling table, in which only x changes
    decode == one download ==> uint8 outputs

Image i depends on (source i, seed i) only. On the fake backend and for every backend's noise that is exact; a real network's
matrix products differ in the last bits between batch sizes, see `clipdit.testing.TOLERANCES`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import torch
from jaxtyping import UInt8
from torch import Tensor

from clipdit.backend import Backend, Limits, OneCall, SamplingDefaults, WholeLoop, open_backend
from clipdit.images import Fit, Placement, fit
from clipdit.sampling import SamplingTable, guide, sample, seeded_noise
from clipdit.shapes import ImageU8, Latent

Size = tuple[int, int] | Literal["own", "nearest"] | None
"""What images are fitted to: (height, width) in pixels; None, the size the checkpoint was trained at; "own", each image's own
size brought up to the next multiple that the backend takes; "nearest", of the sizes that the backend takes, the one that is most
like the image (`Limits.nearest_size`)."""


class Sampling(TypedDict, total=False):
    """How to sample; what is absent or None is the checkpoint's default."""

    steps: int | None
    """Solver steps, at least 1."""
    guidance: float | None
    """Scale of classifier-free guidance; 1 is none, at half the cost."""
    solver: str | None
    """A solver's name, as `clipdit.sampling` has them."""


class Translator:
    """Translates images with one backend. One thread uses it at a time.

    Args:
        backend: an open backend. The translator does not close it, except as a context manager.
        defaults: steps, guidance and solver when a call names none; None is what the backend says.
    """

    def __init__(self, backend: Backend, *, defaults: SamplingDefaults | None = None):
        self.backend = backend
        self.defaults = defaults or backend.defaults
        self._tables: dict[tuple[int, str | None], SamplingTable] = {}

    @classmethod
    def open(
        cls,
        folder: Path | str | None = None,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Translator":
        """A translator on a checkpoint or bundle folder; None is the built-in checkpoint. Arguments as `open_backend`'s."""
        return cls(open_backend(folder, backend, device=device, dtype=dtype))

    def __enter__(self) -> "Translator":
        return self

    def __exit__(self, *_) -> None:
        self.backend.close()

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) the checkpoint was trained at, pixels."""
        return self.backend.limits.native_size

    def settings(self, **sampling: Unpack[Sampling]) -> SamplingDefaults:
        """What a call with these arguments uses, defaults filled in. ValueError if the model cannot be sampled so."""
        chosen = replace(self.defaults, **{name: value for name, value in sampling.items() if value is not None})
        if not math.isfinite(chosen.guidance):
            raise ValueError(f"guidance is {chosen.guidance}; wanted a finite number, 1 for none")
        table = self._table(chosen)
        if chosen.guidance != 1 and not self.backend.limits.guidable:
            raise ValueError(f"guidance is {chosen.guidance}; this model was trained without, and takes 1")
        return replace(chosen, guidance=float(chosen.guidance), solver=table.solver)

    @torch.inference_mode()
    def __call__(
        self,
        source_u8: ImageU8,
        *,
        seeds: Sequence[int],
        on_step: Callable[[int, Latent], None] | None = None,
        **sampling: Unpack[Sampling],
    ) -> ImageU8:
        """Translate a batch of equal size.

        Args:
            source_u8: uint8 (B, 3, H, W), on any device, of a size the backend takes.
            seeds: B integers from 0 to 2**63 - 1, one an image.
            on_step: called with (row, x) after each evaluation of the network.
            sampling: steps, guidance, solver; see `Sampling`.

        Returns:
            uint8 (B, 3, H, W) on the CPU.

        Raises:
            ValueError: a size or batch the backend does not take, seeds that do not match, an unknown solver.
        """
        backend, limits = self.backend, self.backend.limits
        limits.check_images(tuple(source_u8.shape))
        batch, _, height, width = source_u8.shape
        if len(seeds) != batch:
            raise ValueError(f"{len(seeds)} seeds for {batch} images; wanted one each")
        chosen = self.settings(**sampling)
        table = self._table(chosen)

        # x is carried in float32 whatever the networks compute in: small steps would lose their bits in bfloat16
        noise = seeded_noise(seeds, limits.latent_shape(height, width), limits.device)
        if isinstance(backend, OneCall) and on_step is None and backend.is_one_call((height, width), table, chosen.guidance):
            return backend.translate(source_u8.to(limits.device), noise, table, guidance=chosen.guidance).cpu()
        condition = backend.encode(source_u8.to(limits.device))
        if isinstance(backend, WholeLoop) and not table.stochastic and on_step is None:
            latent = backend.sample(noise, condition, table, guidance=chosen.guidance)
        else:
            latent = sample(
                guide(backend.velocity, condition, chosen.guidance, max_batch=limits.max_batch),
                noise,
                table,
                step_noise=lambda i: seeded_noise(seeds, tuple(noise.shape[1:]), limits.device, draw=i + 1),
                on_step=on_step,
            )
        return backend.decode(latent).cpu()

    def fit(self, image_u8: UInt8[Tensor, "3 H W"], size: Size = None, how: Fit = "pad") -> tuple[Tensor, Placement]:
        """An image of any size as one this translator takes, and the way back. See `clipdit.images.fit` for `how`.

        ValueError when the backend does not take that size."""
        return fit_within(self.backend.limits, image_u8, size, how)

    def translate_images(
        self,
        images_u8: Sequence[UInt8[Tensor, "3 _ _"]],
        *,
        seeds: Sequence[int],
        size: Size = None,
        how: Fit = "pad",
        batch_size: int = 8,
        **sampling: Unpack[Sampling],
    ) -> list[UInt8[Tensor, "3 _ _"]]:
        """Translate images of any sizes: fitted, translated, and brought back to the size and aspect they came with (with
        `how="crop"`, to those of the part that was kept). Results in the order of the images."""
        if len(seeds) != len(images_u8):
            raise ValueError(f"{len(seeds)} seeds for {len(images_u8)} images; wanted one each")
        fitted = [self.fit(image, size, how) for image in images_u8]
        by_size: dict[torch.Size, list[int]] = {}
        for i, (image, _) in enumerate(fitted):
            by_size.setdefault(image.shape, []).append(i)
        results: dict[int, Tensor] = {}
        step = min(batch_size, self.backend.limits.max_batch or batch_size)
        for members in by_size.values():
            for start in range(0, len(members), step):
                chunk = members[start : start + step]
                outputs = self(torch.stack([fitted[i][0] for i in chunk]), seeds=[seeds[i] for i in chunk], **sampling)
                results |= {i: fitted[i][1].restore(output) for i, output in zip(chunk, outputs, strict=True)}
        return [results[i] for i in range(len(images_u8))]

    def translate_image(
        self,
        image_u8: UInt8[Tensor, "3 H W"],
        *,
        seed: int = 0,
        size: Size = None,
        how: Fit = "pad",
        **sampling: Unpack[Sampling],
    ) -> UInt8[Tensor, "3 H0 W0"]:
        """Translate one image of any size; see `translate_images`."""
        (output,) = self.translate_images([image_u8], seeds=[seed], size=size, how=how, **sampling)
        return output

    def _table(self, chosen: SamplingDefaults) -> SamplingTable:
        key = (chosen.steps, chosen.solver)
        if key not in self._tables:
            self._tables[key] = self.backend.table(*key)
        return self._tables[key]


def fit_within(limits: Limits, image_u8: UInt8[Tensor, "3 H W"], size: Size = None, how: Fit = "pad") -> tuple[Tensor, Placement]:
    """`Translator.fit`, where only the limits are known: in a process that holds no model."""
    if size == "own":
        height, width = (math.ceil(side / limits.multiple) * limits.multiple for side in image_u8.shape[-2:])
    elif size == "nearest":
        height, width = limits.nearest_size(*image_u8.shape[-2:])
    else:
        height, width = limits.native_size if size is None else size
    limits.check_images((1, 3, height, width))
    return fit(image_u8, (height, width), how)
