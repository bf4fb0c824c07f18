"""The configuration of a run: dataclasses that stand beside what they configure, put together. presets.py fills them in.

A run folder keeps its experiment, resolved, as experiment.json: nobody types the model's width twice.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro

from clipdit.backend import BUILT_IN
from clipdit.data.augment import Augment
from clipdit.data.layouts import Direction
from clipdit.diffusion import DDPM
from clipdit.files import write_atomically
from clipdit.flow import FlowMatching
from clipdit.model.dit import MLP, SIZES, Conditioning, DiT, Norm, Positions
from clipdit.train.adversarial import AdversarySettings, GlobalGeneratorSettings, UNetSettings
from clipdit.train.autoencoder import AutoencoderSettings, DecoderSettings
from clipdit.train.clip import ClipSettings
from clipdit.train.loop import TrainSettings
from clipdit.train.student import EndsSettings
from clipdit.train.translation import LossSettings

EXPERIMENT_FILE = "experiment.json"


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Which pairs, and at what size."""

    size: int = 256
    """Height and width of training, pixels; images are fitted by padding."""
    direction: Direction = "AtoB"
    """Which side is the source; see docs/data.md."""
    augment: Augment = field(default_factory=Augment)
    """Versions of each pair that are cached."""
    cache: Path | None = None
    """Folder of cached latents, to share among runs; none: `cache/` in the run folder."""

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"pairs.size is {self.size}; wanted pixels, at least 8")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The DiT; what its input looks like follows from the VAE and CLIP in use."""

    width: int = 384
    """D, the width of the tokens."""
    depth: int = 12
    """Blocks."""
    heads: int = 6
    """Attention heads; 64 wide ones suit fused kernels."""
    patch: int = 2
    """Latent cells in a token, along one side: 1, 2 or 4."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over D."""
    mlp: MLP = "gelu"
    """gelu is DiT's; swiglu has a gate, and at ratio 2.667 as many parameters as gelu at 4."""
    conditioning: Conditioning = "both"
    """How the source reaches the DiT: clip (the paper's way), concat (its latent), or both."""
    cross_attention_every: int = 1
    """A block in so many reads CLIP's patch tokens; 0 is none, as in the paper."""
    qk_norm: bool = True
    """RMSNorm on queries and keys; steadier at large learning rates."""
    norm: Norm = "layer"
    """Before each branch."""
    positions: Positions = "rope"
    """rope works at any size; sincos is DiT's, a little faster."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; wanted at least 1")
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(f"model.width {self.width} with {self.heads} heads; wanted a whole multiple of 4 for each head")
        if not self.mlp_ratio * self.width >= 1:
            raise ValueError(f"model.mlp_ratio is {self.mlp_ratio}; wanted a number above 0, such as 4")
        if self.cross_attention_every < 0:
            raise ValueError(f"model.cross_attention_every is {self.cross_attention_every}; wanted 0 or more")

    @classmethod
    def of_size(cls, name: str, patch: int = 2, **changes) -> "ModelSettings":
        """DiT-Ti, S, B, L or XL of Peebles & Xie 2023, such as `of_size("B")` for DiT-B/2."""
        width, depth, heads = SIZES[name]
        return cls(width=width, depth=depth, heads=heads, patch=patch, **changes)

    def make(self, *, latent_channels: int, clip_token_width: int, clip_embedding_width: int) -> DiT:
        """A fresh DiT."""
        return DiT(
            **asdict(self),
            latent_channels=latent_channels,
            clip_token_width=clip_token_width,
            clip_embedding_width=clip_embedding_width,
        )


@dataclass(frozen=True, kw_only=True)
class TranslationExperiment:
    """Pairs -> a checkpoint that translates."""

    vae: str
    """The VAE: a folder, a checkpoint to take it from, or a hub id."""
    clip: str | None
    """The CLIP image encoder, likewise; not used with conditioning "concat" and no CLIP-similarity loss."""
    pairs: PairSettings = field(default_factory=PairSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    objective: tyro.conf.AvoidSubcommands[FlowMatching | DDPM] = field(default_factory=FlowMatching)
    loss: LossSettings = field(default_factory=LossSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    drop_condition: float = 0.1
    """Share of the images whose source is withheld in training, so that guidance has something to subtract."""
    steps: int = 20
    """Default sampling steps of the checkpoint."""
    guidance: float = 1.0
    """Default guidance of the checkpoint; 1 is none."""
    init: str | None = None
    """A checkpoint whose DiT is trained on, instead of a fresh one; of the same model settings and CLIP, and of the same VAE or
    one that was fine-tuned from it."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_condition <= 1:
            raise ValueError(f"drop_condition is {self.drop_condition}; wanted a share in [0, 1]")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; wanted at least 1")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}; wanted a finite number")
        if self.guidance != 1 and not self.drop_condition:
            raise ValueError(
                f"guidance is {self.guidance}, and drop_condition 0; guidance needs a model trained without a source, too. "
                "Give --drop-condition 0.1, or --guidance 1"
            )
        if self.clip is None and self.model.conditioning != "concat":
            raise ValueError(f'conditioning "{self.model.conditioning}" reads CLIP; give --clip, or --model.conditioning concat')
        for name in ("clip_similarity", "alignment"):
            if self.clip is None and getattr(self.loss, name):
                raise ValueError(f"loss.{name} needs CLIP; give --clip, or --loss.{name.replace('_', '-')} 0")


@dataclass(frozen=True, kw_only=True)
class StudentExperiment:
    """A checkpoint and pairs -> a checkpoint that needs 1 to 4 steps and no guidance for what the first one does in 20."""

    teacher: str = BUILT_IN
    """The checkpoint to learn from, trained by flow matching; its DiT, VAE, CLIP and size are the student's, too."""
    guidance: float | None = None
    """With which the teacher is followed; its default if not given."""
    pairs: PairSettings = field(default_factory=PairSettings)
    objective: FlowMatching = field(default_factory=lambda: FlowMatching(times="uniform", at_noise=0.5))
    ends: EndsSettings = field(default_factory=EndsSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    steps: int = 1
    """Default sampling steps of the checkpoint."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; wanted at least 1")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}; wanted a finite number")


@dataclass(frozen=True, kw_only=True)
class AdversarialExperiment:
    """Pairs -> a checkpoint that translates in one step: a generator, taught by a discriminator."""

    pairs: PairSettings = field(default_factory=PairSettings)
    model: tyro.conf.AvoidSubcommands[UNetSettings | GlobalGeneratorSettings] = field(default_factory=UNetSettings)
    loss: AdversarySettings = field(default_factory=AdversarySettings)
    train: TrainSettings = field(default_factory=TrainSettings)


@dataclass(frozen=True, kw_only=True)
class AutoencoderExperiment:
    """Images of pairs -> a VAE (`vae/` in the run folder)."""

    pairs: PairSettings = field(default_factory=PairSettings)
    model: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    init: str | None = None
    """A VAE that is trained on, encoder and all, instead of a fresh one, of the same model settings: a folder, a checkpoint to
    take it from, or a hub id. Its latents change: a DiT that reads them has to be trained anew."""

    def __post_init__(self) -> None:
        if self.pairs.size % self.model.downscale:
            raise ValueError(
                f"pairs.size is {self.pairs.size}; wanted a multiple of {self.model.downscale}, the pixels of a cell"
            )


@dataclass(frozen=True, kw_only=True)
class DecoderExperiment:
    """Targets of pairs -> a VAE with a better decoder and the same latents (`vae/` in the run folder)."""

    vae: str
    """The VAE to begin with: a folder, a checkpoint to take it from, or a hub id."""
    pairs: PairSettings = field(default_factory=PairSettings)
    model: DecoderSettings = field(default_factory=DecoderSettings)
    train: TrainSettings = field(default_factory=TrainSettings)


@dataclass(frozen=True, kw_only=True)
class ClipExperiment:
    """Images of pairs and their names -> a CLIP (`clip/` in the run folder)."""

    pairs: PairSettings = field(default_factory=PairSettings)
    model: ClipSettings = field(default_factory=ClipSettings)
    train: TrainSettings = field(default_factory=TrainSettings)


Experiment = (
    TranslationExperiment | StudentExperiment | AdversarialExperiment | AutoencoderExperiment | DecoderExperiment | ClipExperiment
)


def to_json(experiment: Experiment, preset: str) -> dict:
    """The resolved experiment as plain data."""
    plain = json.loads(json.dumps(asdict(experiment), default=str))
    del plain["pairs"]["cache"]  # a place on one machine, and nothing that results depend on
    objective = getattr(experiment, "objective", None)
    return {"preset": preset, **plain} | (
        {"objective": {"kind": type(objective).__name__, **plain["objective"]}} if objective else {}
    )


def write_experiment(folder: Path, plain: dict) -> None:
    """Write experiment.json."""
    write_atomically(folder / EXPERIMENT_FILE, json.dumps(plain, indent=2) + "\n")
