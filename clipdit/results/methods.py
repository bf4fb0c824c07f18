"""What is compared. A method makes its experiment from ours: pairs, size and seed are the same by construction."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from clipdit.diffusion import DDPM
from clipdit.experiment import AdversarialExperiment, StudentExperiment, TranslationExperiment
from clipdit.flow import FlowMatching
from clipdit.presets import paper, pix2pix, pix2pixhd

Role = Literal["baseline", "paper", "ours", "student", "ablation"]
Trained = TranslationExperiment | AdversarialExperiment


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the comparison."""

    label: str
    """What tables and figures call it."""
    role: Role
    make: Callable[[TranslationExperiment], Trained] | None
    """Our experiment -> this one. None: it learns from the run of `teacher`."""
    steps: tuple[int, ...] = ()
    """Evaluated with so many sampling steps, too, beside its default."""
    teacher: str = ""
    about: str
    """One line for the reader."""


def _adversarial(preset: AdversarialExperiment, base: TranslationExperiment) -> AdversarialExperiment:
    """A baseline as published, on the pairs of `base`, which are changed as `base` has them."""
    train = replace(preset.train, seed=base.train.seed, precision=base.train.precision)
    return replace(preset, pairs=base.pairs, train=train)


def _changed(**parts: dict[str, object]) -> Callable[[TranslationExperiment], TranslationExperiment]:
    """Ours with fields replaced, by part: `_changed(model={"qk_norm": True})`."""

    def make(base: TranslationExperiment) -> TranslationExperiment:
        made = {part: replace(getattr(base, part), **fields) for part, fields in parts.items()}  # pyright: ignore[reportArgumentType]  (fields by name)
        return replace(base, **made)

    return make


METHODS: dict[str, Method] = {
    "pix2pix": Method(
        label="Pix2Pix",
        role="baseline",
        make=lambda base: _adversarial(pix2pix(), base),
        about="U-Net and PatchGAN, 100 L1 (Isola et al. 2017), as published",
    ),
    "pix2pixhd": Method(
        label="Pix2PixHD",
        role="baseline",
        make=lambda base: _adversarial(pix2pixhd(), base),
        about="global generator, two PatchGANs, feature matching, perceptual loss (Wang et al. 2018), as published",
    ),
    "paper": Method(
        label="paper recipe",
        role="paper",
        make=paper,
        about="DDPM, the CLIP embedding through adaLN alone, CLIP-similarity and perceptual losses (arXiv 2505.16001)",
    ),
    "ours": Method(
        label="ours",
        role="ours",
        make=lambda base: base,
        steps=(1, 2, 4),
        about="flow matching, source latent and CLIP tokens, guidance",
    ),
    "student": Method(
        label="student",
        role="student",
        make=None,
        teacher="ours",
        steps=(2, 4),
        about="reflow of ours, after it and for as long again",
    ),
    "clip": Method(
        label="CLIP alone",
        role="ablation",
        make=_changed(model={"conditioning": "clip"}),
        about="ours without the source latent",
    ),
    "concat": Method(
        label="source latent alone",
        role="ablation",
        make=_changed(model={"conditioning": "concat"}),
        about="ours without CLIP",
    ),
    "ddpm": Method(
        label="DDPM",
        role="ablation",
        make=lambda base: replace(base, objective=DDPM(), steps=50),
        about="ours with noise prediction and 50 steps of DDIM",
    ),
    "paper-flow": Method(
        label="paper recipe, flow matching",
        role="ablation",
        make=lambda base: replace(paper(base), objective=FlowMatching(), steps=20),
        about="the paper's recipe with our objective",
    ),
    "perceptual": Method(
        label="and perceptual loss",
        role="ablation",
        make=_changed(loss={"perceptual": 0.5}),
        about="ours with 0.5 of the perceptual loss",
    ),
    "clip-similarity": Method(
        label="and CLIP similarity",
        role="ablation",
        make=_changed(loss={"clip_similarity": 0.5}),
        about="ours with 0.5 of the CLIP-similarity loss",
    ),
    "alignment": Method(
        label="and REPA",
        role="ablation",
        make=_changed(loss={"alignment": 0.5}),
        about="ours with 0.5 of a loss that aligns a block's tokens with CLIP's of the target (Yu et al. 2025)",
    ),
    "qk-norm": Method(
        label="and QK-norm",
        role="ablation",
        make=_changed(model={"qk_norm": True}),
        about="ours with RMSNorm on queries and keys",
    ),
    "uniform-times": Method(
        label="uniform times",
        role="ablation",
        make=_changed(objective={"times": "uniform"}),
        about="ours with training times drawn uniformly",
    ),
    "not-at-noise": Method(
        label="no times at the noise",
        role="ablation",
        make=_changed(objective={"at_noise": 0.0}),
        steps=(1, 2, 4),
        about="ours with no training times at the noise itself, where sampling begins",
    ),
}
MAIN = tuple(name for name, method in METHODS.items() if method.role != "ablation")
"""The paper's comparison; the others say what ours is made of."""


def student_of(base: TranslationExperiment, preset: StudentExperiment, teacher: str) -> StudentExperiment:
    """The student of a run, on the pairs of `base`."""
    train = replace(preset.train, seed=base.train.seed, precision=base.train.precision)
    return replace(preset, teacher=teacher, pairs=base.pairs, train=train)
