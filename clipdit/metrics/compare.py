"""Compares the outputs of a few sources with those sources and their targets: every metric that is a number per image."""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from clipdit.images import to_float
from clipdit.metrics import edges, pixels
from clipdit.metrics.edges import GivenEdges
from clipdit.metrics.judges import Judges
from clipdit.shapes import ImageU8

Samples = UInt8[Tensor, "B S 3 H W"]
"""S outputs, from different seeds, of each of B sources."""

Values = dict[str, Float[Tensor, "B S"]]
"""Metric -> value by source and sample; S is 1 where only the first sample is judged."""

CHUNK = 8
"""Images through a network at once: on CPUs the maps of larger batches fall out of the cache."""

HIGHER_IS_NEARER = ("psnr_db", "ssim", "clip_similarity_to_target")
"""Of the distances to the target; of the others, lower is nearer."""


class Comparison:
    """B sources and their targets, ready to be compared with any number of rows of outputs: theirs is computed once.

    Args:
        indices: where these sources stand in `given`.
        others: for each source, which other sources its outputs are compared with.
    """

    def __init__(
        self, sources: ImageU8, targets: ImageU8, judges: Judges, *, given: GivenEdges, indices: range, others: list[list[int]]
    ) -> None:
        self.targets, self.judges = targets, judges
        self.given, self.indices, self.others = given, indices, others
        self.embedded_targets = {name: self._by_network(d.embed, targets) for name, d in judges.perceptual.items()}
        self.clip_of_sources = self._clip(sources)
        self.clip_of_targets = self._clip(targets)

    def to_target(self, outputs: Samples) -> Values:
        """Distances to the target, and with two samples or more the mean distance between them (`pairwise_...`)."""
        self._check(outputs)
        targets = self.targets[:, None].expand_as(outputs).flatten(0, 1)
        shape = outputs.shape[:2]
        values: Values = {
            "psnr_db": pixels.psnr(outputs.flatten(0, 1), targets).view(shape),
            "ssim": pixels.ssim(outputs.flatten(0, 1), targets).view(shape),
        }
        for name in self.judges.perceptual:
            values |= self._perceptual(name, outputs)
        if self.clip_of_targets is not None:
            values["clip_similarity_to_target"] = self._clip_similarity(outputs, self.clip_of_targets)
        return values

    def to_source(self, outputs: Samples) -> Values:
        """Faithfulness: agreement of edges with the own source and with others, CLIP similarity to the source."""
        self._check(outputs)
        values = self._edges(outputs)
        if self.clip_of_sources is not None:
            values["clip_similarity_to_source"] = self._clip_similarity(outputs, self.clip_of_sources)
        return values

    def _check(self, outputs: Samples) -> None:
        if outputs.dtype != torch.uint8 or outputs.shape[0] != len(self.indices) or outputs.shape[2:] != self.targets.shape[1:]:
            wanted = ", ".join(map(str, (len(self.indices), "S", *self.targets.shape[1:])))
            raise ValueError(f"outputs are {outputs.dtype} of shape {tuple(outputs.shape)}; wanted uint8 of shape ({wanted})")

    def _perceptual(self, name: str, outputs: Samples) -> Values:
        network, samples = self.judges.perceptual[name], outputs.shape[1]
        distances, spreads = [], []
        group = max(1, CHUNK // samples)  # an embedding is 2.6 MB at 128 px, so never those of all outputs at once
        for some, wanted in zip(outputs.split(group), self.embedded_targets[name].split(group), strict=True):
            embedded = self._by_network(network.embed, some.flatten(0, 1)).unflatten(0, some.shape[:2])  # (b, S, F)
            distances.append((embedded - wanted[:, None]).square().sum(dim=2))
            if samples > 1:
                # the mean over pairs a < b of |e_a - e_b|^2 is 2 S / (S - 1) times the mean squared distance to the centre
                centre = embedded.mean(dim=1, keepdim=True)
                spread = (embedded - centre).square().sum(dim=2).mean(dim=1, keepdim=True)
                spreads.append(spread * 2 * samples / (samples - 1))
        return {name: torch.cat(distances)} | ({f"pairwise_{name}": torch.cat(spreads)} if spreads else {})

    def _edges(self, outputs: Samples) -> Values:
        own, other = [], []
        for i, others, of_source in zip(self.indices, self.others, outputs, strict=True):
            for output in of_source:
                found = edges.image_edges(output)
                first, *rest = self.given.agreement(found, [i, *others])
                own.append(first)
                other.append(torch.tensor([agreement.f1 for agreement in rest]).median() if rest else torch.tensor(torch.nan))
        shape = outputs.shape[:2]
        return {
            "edge_precision": torch.tensor([agreement.precision for agreement in own]).view(shape),
            "edge_recall": torch.tensor([agreement.recall for agreement in own]).view(shape),
            "edge_f1": torch.tensor([agreement.f1 for agreement in own]).view(shape),
            "edge_f1_other_source": torch.stack(other).view(shape),
        }

    def _clip_similarity(self, outputs: Samples, wanted: Float[Tensor, "B P"]) -> Float[Tensor, "B 1"]:
        pooled = self._clip(outputs[:, 0])
        assert pooled is not None
        return F.cosine_similarity(pooled, wanted)[:, None]

    def _clip(self, images_u8: ImageU8) -> Float[Tensor, "B P"] | None:
        encoder = self.judges.clip
        return None if encoder is None else self._by_network(lambda image: encoder(image)[1], images_u8)

    def _by_network(self, network: Callable[[Tensor], Tensor], images_u8: ImageU8) -> Float[Tensor, "B _"]:
        return torch.cat([network(to_float(part.to(self.judges.device))).float().cpu() for part in images_u8.split(CHUNK)])
