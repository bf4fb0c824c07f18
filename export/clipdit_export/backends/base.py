"""What all backends of bundles have in common: the parts in their order, and what is computed once and kept.

What depends on the source alone (the conditioner's outputs) is computed at the first `velocity` of a condition and kept for as
long as the caller keeps that condition; modulation is computed for all rows of a table before the loop.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from clipdit.backend import Condition, Limits, SamplingDefaults
from clipdit.sampling import SamplingTable, guide, sample
from clipdit.shapes import ImageU8, Latent, Time
from clipdit_export.bundle import Bundle, open_bundle
from clipdit_export.manifest import MANIFEST_FILE, Audit, Target, Variant
from clipdit_export.names import name_of, size_of, whole_name
from clipdit_export.processor import doubt

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
Graph = Callable[[Tensors], Tensors]
"""Inputs by name to outputs by name. Inputs that the graph does not read may be among them."""
OnCall = Callable[[str, Tensors], None]
"""Told of every call of a graph: the part, and its inputs."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class BundleBackend:
    """A variant of a bundle. A runtime says how it loads a graph (`_load`) and why it cannot run here (`missing`)."""

    name: str
    target: ClassVar[Target]
    """Of the variants that it opens."""
    preference: ClassVar[int]
    device_type: ClassVar[str] = "cpu"

    def __init__(
        self,
        bundle: Bundle,
        variant: str,
        *,
        device: torch.device | None = None,
        on_call: OnCall | None = None,
        in_parts: bool = False,
    ):
        """`in_parts`: never a whole translation in one call, for who asks what goes from part to part."""
        model = bundle.manifest.model
        sizes = tuple(size_of(name) for name in bundle.manifest.variants[variant].parts)
        self.variant = variant
        self.limits = Limits(
            device=device or torch.device("cpu"),
            dtype=DTYPES[bundle.manifest.variants[variant].recipe.compute],
            max_batch=bundle.manifest.max_batch,
            sizes=sizes,
            multiple=model.multiple,
            native_size=model.native_size if model.native_size in sizes else sizes[0],
            latent_channels=model.latent_channels,
            downscale=model.downscale,
            guidable=model.guidable,
        )
        self.defaults = SamplingDefaults(steps=model.steps, guidance=model.guidance, solver=None)
        self.fingerprint = model.checkpoint
        self._bundle, self._model, self._objective, self._on_call = bundle, model, bundle.objective, on_call
        self._in_parts = in_parts
        self._graphs: dict[str, Graph] | None = {}
        self._contexts: WeakKeyDictionary[Condition, Tensors] = WeakKeyDictionary()

    @classmethod
    def missing(cls) -> str | None:
        """Why this runtime cannot run on this machine, in a line that ends in what to do; None when it can."""
        raise NotImplementedError

    @classmethod
    def unfit(cls, variant: Variant) -> str | None:
        """Why a variant of this runtime's cannot run on this machine, ending in what to do; None when it can."""
        return None

    def _load(self, path: Path, variant: Variant) -> Graph:
        raise NotImplementedError

    @classmethod
    def why_not(cls, folder: Path) -> str | None:
        """Whether this is a bundle with a variant for this runtime, and the runtime is here."""
        if not (folder / MANIFEST_FILE).exists():
            return f"{folder} holds no {MANIFEST_FILE}, so it is no bundle; wanted a folder made by `clipdit export`"
        if (reason := cls.missing()) is not None:
            return reason
        try:
            bundle = open_bundle(folder)
        except ValueError as error:
            return str(error)
        if cls._known(bundle):
            return None
        unfit = [cls.unfit(variant) for variant in bundle.manifest.variants.values() if variant.target == cls.target]
        return unfit[0] if unfit else f"{folder} holds no {cls.target} variant; export with --targets {cls.target}"

    @classmethod
    def open(
        cls, folder: Path, *, device: torch.device | None = None, dtype: torch.dtype | None = None, variant: str | None = None
    ) -> Self:
        """Open a variant of this runtime's; None is the best of them by the bundle's own measurements, or the one that computes
        in `dtype`. ValueError for a damaged bundle, an unknown variant, or a device that this runtime does not serve."""
        if device is not None and device.type != cls.device_type:
            raise ValueError(f"device is {device}; the {cls.name} backend runs on {cls.device_type}")
        bundle = open_bundle(folder)
        known = cls._known(bundle)
        if dtype is not None and variant is None:
            wanted = {known: word for word, known in DTYPES.items()}.get(dtype, str(dtype))
            variant = f"{cls.target}-{wanted}"
        given = bundle.manifest.variants.get(variant or "")
        if given is not None and given.target == cls.target and (reason := cls.unfit(given)) is not None:
            raise ValueError(f"{variant} cannot be opened: {reason}")
        if not known or (variant is not None and variant not in known):
            raise ValueError(f"{folder} holds no variant {variant} for the {cls.name} backend; there are {', '.join(known)}")
        chosen = variant or known[0]
        if (reason := doubt(bundle.manifest.variants[chosen])) is not None:
            logger.warning("%s: %s", chosen, reason)
        return cls(bundle, chosen, device=device or torch.device(cls.device_type))

    @classmethod
    def variants(cls, folder: Path) -> list[str]:
        """Those of a bundle that this runtime opens, the best first, and last what this machine computes worse than others do."""
        return cls._known(open_bundle(folder))

    @classmethod
    def _known(cls, bundle: Bundle) -> list[str]:
        ranked = [*bundle.manifest.ladder, *bundle.manifest.variants]
        variants = {name: bundle.manifest.variants[name] for name in ranked}
        fit = [name for name, variant in variants.items() if variant.target == cls.target and cls.unfit(variant) is None]
        return sorted(fit, key=lambda name: doubt(variants[name]) is not None)  # those last; otherwise as they were

    def encode(self, source_u8: ImageU8) -> Condition:
        self._check_open()
        self.limits.check_images(tuple(source_u8.shape))
        size, given = (source_u8.shape[-2], source_u8.shape[-1]), {"source_u8": source_u8.to(self.limits.device)}
        latent = self._run(size, "vae_encoder", given)["latent"]
        if "image_encoder" in self._bundle.manifest.variants[self.variant].parts[name_of(size)]:
            seen = self._run(size, "image_encoder", given)
            tokens, pooled = seen["tokens"], seen["pooled"]
        else:
            tokens = latent.new_zeros(len(latent), *self._model.tokens)
            pooled = latent.new_zeros(len(latent), self._model.pooled)
        return Condition(tokens=tokens, pooled=pooled, latent=latent)

    def velocity(self, x: Latent, t: Time, condition: Condition) -> Latent:
        self._check_open()
        if x.shape != condition.latent.shape or t.shape != x.shape[:1]:
            raise ValueError(f"x is {tuple(x.shape)}, t is {tuple(t.shape)}; the condition is of {tuple(condition.latent.shape)}")
        size, context = self._size(x), self._context(condition)
        modulation = self._run(size, "modulation", {"t": t.float(), **context})
        return self._run(size, "step", {"x": x.float(), **modulation, **context})["velocity"].to(x.dtype)

    def sample(self, noise: Latent, condition: Condition, table: SamplingTable, *, guidance: float = 1.0) -> Latent:
        """See `clipdit.backend.WholeLoop`: the modulation of all rows comes from few calls, before the steps."""
        self._check_open()
        size = self._size(noise)
        rows: dict[int, Iterator[tuple[Tensor, Tensor]]] = {}  # of each condition that guidance asks for

        def velocity(x: Latent, t: Time, of: Condition) -> Latent:
            blocks, final = next(rows.setdefault(id(of), self._modulation(size, of, table)))
            given = {"x": x.float(), "blocks": blocks, "final": final, **self._context(of)}
            return self._run(size, "step", given)["velocity"].to(x.dtype)

        return sample(guide(velocity, condition, guidance, max_batch=self.limits.max_batch), noise, table)

    def _modulation(self, size: tuple[int, int], condition: Condition, table: SamplingTable) -> Iterator[tuple[Tensor, Tensor]]:
        """(blocks, final) of every row; as many rows in a call as the batch allows."""
        batch, device = len(condition.latent), condition.latent.device
        pooled = {n: c for n, c in self._context(condition).items() if n == "pooled_embedding"}
        at_once = max(1, (self.limits.max_batch or batch) // batch)
        for start in range(0, len(table.rows), at_once):
            times = table.times[start : start + at_once]
            t = torch.tensor(times, dtype=torch.float32, device=device).repeat_interleave(batch)
            tiled = {name: tensor.repeat(len(times), 1) for name, tensor in pooled.items()}
            made = self._run(size, "modulation", {"t": t, **tiled})
            yield from zip(*(made[name].split(batch) for name in ("blocks", "final")), strict=True)

    def decode(self, latent: Latent) -> ImageU8:
        self._check_open()
        return self._image(self._run(self._size(latent), "vae_decoder", {"latent": latent.float()}))

    def is_one_call(self, size: tuple[int, int], table: SamplingTable, guidance: float) -> bool:
        """See `clipdit.backend.OneCall`: whether the bundle holds this table as one graph (`clipdit export --unroll`)."""
        self._check_open()
        parts = self._bundle.manifest.variants[self.variant].parts[name_of(size)]
        return not self._in_parts and whole_name(table, guidance) in parts

    def translate(self, source_u8: ImageU8, noise: Latent, table: SamplingTable, *, guidance: float = 1.0) -> ImageU8:
        self._check_open()
        self.limits.check_images(tuple(source_u8.shape))
        given = {"noise": noise.float(), "source_u8": source_u8.to(self.limits.device)}
        return self._image(self._run(self._size(noise), whole_name(table, guidance), given))

    def _image(self, out: Tensors) -> ImageU8:
        if not out["finite"].all():  # NaN would come out as a black image
            raise ValueError(f"variant {self.variant} made numbers that are not finite; open another, such as fp32")
        return out["image_u8"]

    def table(self, steps: int, solver: str | None = None) -> SamplingTable:
        return self._objective.table(steps, solver)

    def close(self) -> None:
        self._graphs = None
        self._contexts.clear()

    def _check_open(self) -> None:
        if self._graphs is None:
            raise RuntimeError(f"the {self.name} backend is closed; open it again")

    def graph(self, size: str, part: str) -> Graph:
        """A part as a function, loaded when it is first asked for."""
        self._check_open()
        assert self._graphs is not None
        variant = self._bundle.manifest.variants[self.variant]
        file = variant.parts[size][part]
        if file not in self._graphs:
            self._graphs[file] = self._load(self._bundle.checked(file), variant)
        return self._graphs[file]

    def audit(self, size: str, part: str) -> Audit | None:
        """What a part really computes in once it is opened; None where a runtime follows the file to the letter."""
        return None

    def _run(self, size: tuple[int, int], part: str, given: Tensors) -> Tensors:
        graph = self.graph(name_of(size), part)
        if self._on_call is not None:
            self._on_call(part, given)
        return graph(given)

    def _size(self, latent: Tensor) -> tuple[int, int]:
        height, width = (side * self.limits.downscale for side in latent.shape[-2:])
        self.limits.check_images((len(latent), 3, height, width))
        return height, width

    def _context(self, condition: Condition) -> Tensors:
        context = self._contexts.get(condition)
        if context is None:
            given = {name: getattr(condition, name).float() for name in ("tokens", "pooled", "latent")}
            context = self._run(self._size(condition.latent), "conditioner", given)
            self._contexts[condition] = context
        return context
