"""The runs that have a name. A preset is a function; a variant calls another and replaces fields.

`clipdit train NAME --data DIR --out RUN` runs one, `clipdit train NAME --help` lists every setting that can be overridden.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from clipdit.backend import BUILT_IN
from clipdit.data.augment import Augment
from clipdit.diffusion import DDPM
from clipdit.experiment import (
    AdversarialExperiment,
    AutoencoderExperiment,
    ClipExperiment,
    DecoderExperiment,
    Experiment,
    ModelSettings,
    PairSettings,
    StudentExperiment,
    TranslationExperiment,
)
from clipdit.flow import FlowMatching
from clipdit.train.adversarial import AdversarySettings, GlobalGeneratorSettings
from clipdit.train.loop import TrainSettings
from clipdit.train.student import EndsSettings
from clipdit.train.translation import LossSettings


def emoji_vae() -> AutoencoderExperiment:
    """A small VAE from nothing: 8 pixels a cell, 16 channels, 2.3 M parameters."""
    return AutoencoderExperiment(
        pairs=PairSettings(size=128),
        train=TrainSettings(steps=4000, batch_size=16, lr=1e-3, ema_decay=0.998, warmup_steps=50),
    )


def vae_decoder() -> DecoderExperiment:
    """The decoder of a VAE, fine-tuned on targets with noise on the latents; a DiT that reads them stays as it is."""
    return DecoderExperiment(
        vae=BUILT_IN,
        pairs=PairSettings(size=128),
        train=TrainSettings(steps=3000, batch_size=16, lr=5e-4, ema_decay=0.998, warmup_steps=50),
    )


def emoji_clip() -> ClipExperiment:
    """The small CLIP of the built-in checkpoint: drawings, renders and names of emoji."""
    return ClipExperiment(
        pairs=PairSettings(size=128),
        train=TrainSettings(steps=1500, batch_size=96, lr=1e-3, weight_decay=0.1, ema_decay=0.998, warmup_steps=100),
    )


def edges2emoji() -> TranslationExperiment:
    """Line drawings to coloured 3-D emoji at 128 px: the built-in checkpoint."""
    return TranslationExperiment(
        vae=BUILT_IN,
        clip=BUILT_IN,
        pairs=PairSettings(
            size=128,
            augment=Augment(views=8, max_rotation_degrees=8, max_zoom=0.12, max_shift=0.04),
        ),
        model=ModelSettings(
            width=256, depth=8, heads=4, cross_attention_every=4, mlp_ratio=3.0, qk_norm=False, positions="sincos"
        ),
        train=TrainSettings(steps=15_000, batch_size=64, lr=1e-3, ema_decay=0.999),
        steps=20,
        guidance=1.5,
    )


def edges2shoes() -> TranslationExperiment:
    """Edge maps to photographs of shoes (side-by-side files) at 128 px."""
    # augmentation for a thousand pairs; with tens of thousands, 2 views (the pair and its mirror image) do, and cache faster
    augment = Augment(views=4, max_rotation_degrees=4, max_zoom=0.08, max_shift=0.03)
    pairs = PairSettings(size=128, augment=augment)
    # 1.5 is right for the emoji; after twenty minutes on shoes 2 is better by nearly every measure (docs/choices.md)
    return replace(edges2emoji(), vae="madebyollin/taesd", clip="openai/clip-vit-base-patch32", pairs=pairs, guidance=2.0)


def face2comics() -> TranslationExperiment:
    """Photographs of faces to comics (two folders) at 256 px with DiT-S/2."""
    return TranslationExperiment(
        vae="stabilityai/sd-vae-ft-mse",
        clip="openai/clip-vit-large-patch14",
        model=ModelSettings.of_size("S"),
    )


def paper(base: TranslationExperiment) -> TranslationExperiment:
    """The recipe of arXiv 2505.16001 on the data of `base`: noise prediction (DDPM), the CLIP embedding through adaLN alone,
    CLIP-similarity and LPIPS losses.

    The paper does not state its loss weights, schedule, size, steps or sampler: the weights 0.1, the linear schedule of Ho et al.
    2020, the model's size and 50 DDIM steps are our choices.
    """
    return replace(
        base,
        model=replace(base.model, conditioning="clip", cross_attention_every=0),
        objective=DDPM(),
        loss=replace(base.loss, clip_similarity=0.1, perceptual=0.1),
        steps=50,
        guidance=1.0,
    )


def paper_edges2shoes() -> TranslationExperiment:
    """The paper's recipe on edges2shoes at 256 px with DiT-B/2, CLIP ViT-L/14 and LPIPS (our choice of size and VAE)."""
    base = TranslationExperiment(
        vae="stabilityai/sd-vae-ft-mse", clip="openai/clip-vit-large-patch14", model=ModelSettings.of_size("B")
    )
    recipe = paper(base)
    return replace(recipe, loss=replace(recipe.loss, perceptual_network="lpips"))


def paper_face2comics() -> TranslationExperiment:
    """The paper's recipe on face2comics; all settings as in paper_edges2shoes."""
    return paper_edges2shoes()


def paper_edges2emoji() -> TranslationExperiment:
    """The paper's recipe at the size, on the data and with the VAE and CLIP of edges2emoji."""
    return paper(edges2emoji())


def yardstick() -> TranslationExperiment:
    """A plain DiT without CLIP, flips only: what half an hour on two CPU cores gives without any of our additions."""
    base = edges2emoji()
    return replace(
        base,
        clip=None,
        pairs=PairSettings(size=128),
        model=ModelSettings(width=256, depth=8, heads=4, conditioning="concat", qk_norm=False, positions="sincos"),
        objective=FlowMatching(at_noise=0.0),
        train=TrainSettings(steps=100_000, batch_size=32, lr=5e-4, schedule="constant"),
        drop_condition=0.0,
        guidance=1.0,
    )


def student() -> StudentExperiment:
    """A few-step student of a checkpoint (--teacher) by reflow: 1 to 4 steps instead of 20, no guidance."""
    return StudentExperiment(
        pairs=edges2emoji().pairs,
        # Teachers of short trainings are more realistic in 4 steps than in 20 (docs/results.md), and are sooner asked.
        ends=EndsSettings(steps=4, reuse=8),
        loss=LossSettings(perceptual=1.0, gate=0.0),  # from any point the estimate is to be an image
        train=TrainSettings(steps=20_000, batch_size=64, lr=5e-4, warmup_steps=50, ema_decay=0.999),
    )


AS_PUBLISHED: dict[str, Any] = {
    "lr": 2e-4, "betas": (0.5, 0.999), "weight_decay": 0.0, "warmup_steps": 0, "ema_decay": 0.0, "clip_norm": 1e9,
}  # fmt: skip
"""Adam of both papers; neither averages weights nor bounds gradients."""


def pix2pix() -> AdversarialExperiment:
    """Pix2Pix (Isola et al. 2017): U-Net and PatchGAN, 100 L1; batch 4 and 15 epochs of 49,825 pairs, as for edges2shoes.

    Constants of the paper (sec. 3.3, 6.1, 6.2) and of its code: Adam at 2e-4 with betas 0.5 and 0.999, jitter of 30 px in 256 and
    mirroring, dropout in use as well. Its norms in training are over the batch; ours are over each image.
    """
    return AdversarialExperiment(
        pairs=PairSettings(augment=Augment(jitter=30 / 256)),
        train=TrainSettings(steps=187_000, batch_size=4, **AS_PUBLISHED, schedule="constant"),
    )


def pix2pixhd() -> AdversarialExperiment:
    """Pix2PixHD (Wang et al. 2018) without labels: global generator, two PatchGANs, feature matching, perceptual loss.

    Constants of its code: least-squares contest, 10 for feature matching and perceptual loss, Adam at 2e-4 with betas 0.5 and
    0.999, falling to zero over the second half of 200 epochs, batch 1. The published perceptual loss is a distance in VGG19,
    which no package brings; ours is ST-LPIPS, with the same factor.
    """
    return AdversarialExperiment(
        pairs=PairSettings(augment=Augment(jitter=30 / 256)),
        model=GlobalGeneratorSettings(),
        loss=AdversarySettings(
            contest="least-squares", l1=0.0, feature_matching=10.0, perceptual=10.0, scales=2, affine=False, padding=2
        ),
        train=TrainSettings(steps=200_000, batch_size=1, **AS_PUBLISHED, schedule="linear"),
    )


PRESETS: dict[str, Callable[[], Experiment]] = {
    function.__name__: function
    for function in (
        edges2emoji, edges2shoes, face2comics, paper_edges2shoes, paper_face2comics, paper_edges2emoji, yardstick,
        student, pix2pix, pix2pixhd,
        emoji_vae, vae_decoder, emoji_clip,
    )
}  # fmt: skip
