"""What a checkpoint is cut into for export: six networks with tensors in and tensors out, or all of it as one.

    image_encoder   source_u8 -> tokens, pooled                                once per image
    vae_encoder     source_u8 -> latent                                        once per image
    conditioner     tokens, pooled, latent -> Context, flattened               once per image
    modulation      t, pooled_embedding -> blocks, final                       once per image and time, ahead of the loop
    step            x, blocks, final, Context -> velocity                      at every step
    vae_decoder     latent -> image_u8, finite                                 once per image
    whole_...       noise, source_u8 -> image_u8, finite                       all of the above, the steps of a table unrolled

Names of inputs and outputs are those of `clipdit.backend`. Height and width are fixed in a graph (a bundle holds one for each
size); the batch is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdit.backend import Condition
from clipdit.images import to_float, to_u8
from clipdit.model.autoencoder import Autoencoder
from clipdit.model.clip import ClipImageEncoder
from clipdit.model.network import Context, Modulation, Network
from clipdit.pipeline import ClipDiTPipeline
from clipdit.sampling import SamplingTable, guide, sample
from clipdit_export.names import whole_name


@dataclass(frozen=True, kw_only=True)
class Part:
    """A network to trace, with what it is called with."""

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    """Example inputs by name, in the order of the module's arguments; dimension 0 is the batch."""
    outputs: tuple[str, ...]


class ImageEncoder(nn.Module):
    """source_u8 (B, 3, H, W) -> tokens (B, M, E), pooled (B, P).

    CLIP's own preprocessing resizes; here that is two products with fixed matrices, which every runtime has: a Resize that is
    cubic and antialiased, few have."""

    rows: Tensor
    columns: Tensor

    def __init__(self, clip: ClipImageEncoder, size: tuple[int, int]):
        super().__init__()
        self.clip, self.resizes = clip, size != (clip.side, clip.side)
        if self.resizes:
            self.register_buffer("rows", _resizing(size[0], clip.side))
            self.register_buffer("columns", _resizing(size[1], clip.side).T.contiguous())

    def forward(self, source_u8: Tensor) -> tuple[Tensor, Tensor]:
        image = to_float(source_u8)
        return self.clip(self.rows @ image @ self.columns if self.resizes else image)


def _resizing(old: int, new: int) -> Tensor:
    """(new, old): what CLIP's preprocessing does to a column of `old` pixels."""
    return F.interpolate(torch.eye(old)[None, None], (new, old), mode="bicubic", antialias=True, align_corners=False)[0, 0]


class VaeEncoder(nn.Module):
    """source_u8 (B, 3, H, W) -> standardised latent (B, C, h, w)."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, source_u8: Tensor) -> Tensor:
        return encode(self.autoencoder, source_u8)


class VaeDecoder(nn.Module):
    """latent (B, C, h, w) -> image_u8 (B, 3, H, W), finite (B,): whether it is made of numbers, which pixels cannot tell."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        return decode(self.autoencoder, latent)


def encode(autoencoder: Autoencoder, source_u8: Tensor) -> Tensor:
    """See `VaeEncoder`."""
    return autoencoder.encode(to_float(source_u8)).float()


def decode(autoencoder: Autoencoder, latent: Tensor) -> tuple[Tensor, Tensor]:
    """See `VaeDecoder`."""
    image = autoencoder.decode(latent).float()
    return to_u8(image), image.isfinite().flatten(1).all(1)


def context_names(dit: Network) -> tuple[str, ...]:
    """The tensors of a `Context`, flattened: only those that this model has."""
    crossing = [i for i, block in enumerate(dit.blocks) if block.cross is not None]
    names = ["source_tokens"] if dit.reads_latent else []
    return (*names, *(f"{what}_{i}" for i in crossing for what in ("keys", "values")))


def flatten(context: Context) -> tuple[Tensor, ...]:
    """In the order of `context_names`."""
    first = [] if context.source_tokens is None else [context.source_tokens]
    return (*first, *(tensor for pair in context.keys_values if pair is not None for tensor in pair))


def unflatten(dit: Network, tensors: tuple[Tensor, ...]) -> Context:
    """The inverse of `flatten`; without the pooled embedding, which acts through the modulation alone."""
    given = dict(zip(context_names(dit), tensors, strict=True))
    pairs = [(given[f"keys_{i}"], given[f"values_{i}"]) if f"keys_{i}" in given else None for i in range(len(dit.blocks))]
    return Context(source_tokens=given.get("source_tokens"), pooled=None, keys_values=tuple(pairs))


class Conditioner(nn.Module):
    """tokens, pooled, latent -> what `context_names` lists, then pooled_embedding (B, D) where the model reads CLIP."""

    def __init__(self, dit: Network):
        super().__init__()
        self.dit = dit

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        context = self.dit.context(condition_from(self.dit, given))
        return flatten(context) if context.pooled is None else (*flatten(context), context.pooled)


def condition_names(dit: Network) -> tuple[str, ...]:
    """Those parts of a `Condition` that this model reads."""
    return (("tokens", "pooled") if dit.reads_clip else ()) + (("latent",) if dit.reads_latent else ())


def condition_from(dit: Network, given: tuple[Tensor, ...]) -> Condition:
    """A condition of the parts that the model reads; the others stay empty."""
    parts = dict(zip(condition_names(dit), given, strict=True))
    empty = given[0].flatten(1)[:, :0]  # no len(): it would fix the batch that the graph was traced with
    nothing = {"tokens": empty[..., None], "pooled": empty, "latent": empty[..., None, None]}
    return Condition(**(nothing | parts))


class ModulationPart(nn.Module):
    """t (B,), pooled_embedding (B, D) where the model reads CLIP -> blocks (B, L, 6, D), final (B, 2, D)."""

    def __init__(self, dit: Network):
        super().__init__()
        self.dit = dit

    def forward(self, t: Tensor, pooled_embedding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        modulation = self.dit.modulation(t, Context(source_tokens=None, pooled=pooled_embedding))
        return modulation.blocks, modulation.final


class Step(nn.Module):
    """x (B, C, h, w), blocks, final, what `context_names` lists -> velocity, like x."""

    def __init__(self, dit: Network):
        super().__init__()
        self.dit = dit

    def forward(self, x: Tensor, blocks: Tensor, final: Tensor, *context: Tensor) -> Tensor:
        return self.dit.forward_prepared(x, Modulation(blocks=blocks, final=final), unflatten(self.dit, context))


class Whole(nn.Module):
    """noise (B, C, h, w), source_u8 (B, 3, H, W) -> image_u8 (B, 3, H, W), finite (B,): a translation, its loop unrolled."""

    def __init__(
        self, dit: Network, autoencoder: Autoencoder, image_encoder: ImageEncoder | None, table: SamplingTable, guidance: float
    ):
        super().__init__()
        if table.stochastic:
            raise ValueError(f"solver {table.solver} adds fresh noise at every step, which no fixed graph can; take another")
        self.dit, self.autoencoder, self.image_encoder = dit, autoencoder, image_encoder
        self.table, self.guidance = table, guidance

    def forward(self, noise: Tensor, source_u8: Tensor) -> tuple[Tensor, Tensor]:
        seen = {"latent": encode(self.autoencoder, source_u8)}
        if self.image_encoder is not None:
            seen |= dict(zip(("tokens", "pooled"), self.image_encoder(source_u8), strict=True))
        condition = condition_from(self.dit, tuple(seen[name] for name in condition_names(self.dit)))
        contexts: dict[int, Context] = {}  # of the condition and of guidance's pair: each once, not at every step

        def velocity(x: Tensor, t: Tensor, of: Condition) -> Tensor:
            if id(of) not in contexts:
                contexts[id(of)] = self.dit.context(of)
            context = contexts[id(of)]
            return self.dit.forward_prepared(x, self.dit.modulation(t, context), context)

        latent = sample(guide(velocity, condition, self.guidance), noise, self.table)
        return decode(self.autoencoder, latent)


def cut(pipeline: ClipDiTPipeline, size: tuple[int, int], *, batch: int = 2, unroll: Sequence[int] = ()) -> list[Part]:
    """The parts of a checkpoint for images of `size` (height, width), pixels; without an image encoder where it has none.

    `unroll`: numbers of steps for which a translation becomes one graph too, with the checkpoint's own solver and guidance."""
    dit, autoencoder, clip = pipeline.transformer, pipeline.autoencoder, pipeline.clip
    shape = (autoencoder.latent_channels, size[0] // autoencoder.downscale, size[1] // autoencoder.downscale)
    generator = torch.Generator().manual_seed(0)
    source_u8 = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, generator=generator)
    latent = torch.randn(batch, *shape, generator=generator)
    parts = [
        Part(name="vae_encoder", module=VaeEncoder(autoencoder), inputs={"source_u8": source_u8}, outputs=("latent",)),
        Part(name="vae_decoder", module=VaeDecoder(autoencoder), inputs={"latent": latent}, outputs=("image_u8", "finite")),
    ]
    condition, encoder = {"latent": latent}, ImageEncoder(clip, size) if clip is not None and dit.reads_clip else None
    with torch.no_grad():
        if encoder is not None:
            parts.append(
                Part(name="image_encoder", module=encoder, inputs={"source_u8": source_u8}, outputs=("tokens", "pooled"))
            )
            condition |= dict(zip(("tokens", "pooled"), encoder(source_u8), strict=True))
        conditioner, read = Conditioner(dit), {name: condition[name] for name in condition_names(dit)}
        names = context_names(dit) + (("pooled_embedding",) if dit.reads_clip else ())
        context = {name: tensor.contiguous() for name, tensor in zip(names, conditioner(*read.values()), strict=True)}
        parts.append(Part(name="conditioner", module=conditioner, inputs=read, outputs=names))
        t = torch.rand(batch, generator=generator)
        given = {"t": t} | {name: context.pop(name) for name in ("pooled_embedding",) if name in context}
        modulation = ModulationPart(dit)
        parts.append(Part(name="modulation", module=modulation, inputs=given, outputs=("blocks", "final")))
        blocks, final = modulation(*given.values())
        x = torch.randn(batch, *shape, generator=generator)
        inputs = {"x": x, "blocks": blocks, "final": final} | context
        parts.append(Part(name="step", module=Step(dit), inputs=inputs, outputs=("velocity",)))
    defaults = pipeline.sampling_defaults
    for steps in unroll:
        table = pipeline.objective.table(steps, defaults.solver)
        whole = Whole(dit, autoencoder, encoder, table, defaults.guidance)
        inputs = {"noise": x, "source_u8": source_u8}
        parts.append(Part(name=whole_name(table, defaults.guidance), module=whole, inputs=inputs, outputs=("image_u8", "finite")))
    return parts
