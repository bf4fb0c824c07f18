"""For tests, ours and yours: a whole checkpoint of half a megabyte, and the tolerances that all tests of a backend share.

A tolerance is never widened without a reason written beside it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from clipdit.experiment import TranslationExperiment
from clipdit.flow import FlowMatching
from clipdit.model.dit import Conditioning, DiT
from clipdit.objective import Objective
from clipdit.pipeline import ClipDiTPipeline, save_checkpoint


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far two computations of the same thing may be apart."""

    relative: float
    """Of latents, conditions and predictions: largest difference over the largest magnitude."""
    levels: int
    """Of images: largest difference of a pixel, of 255."""


TOLERANCES = {
    # Matrix products choose another kernel, and so another order of summation, for another batch size or another device. On the
    # built-in checkpoint (20 steps, CPU) 1 pixel in 100,000 differs between batch sizes, by 1 level.
    torch.float32: Tolerance(relative=1e-4, levels=1),
    # 11 bits of mantissa
    torch.float16: Tolerance(relative=2e-2, levels=6),
    # 8 bits of mantissa: one rounding is 0.4 %, and a network rounds after every layer. On the built-in checkpoint at most 6
    # levels between batch sizes, and 10 from float32 (0.3 on average).
    torch.bfloat16: Tolerance(relative=6e-2, levels=16),
}
"""By the dtype of `Limits`: between batch sizes, and between a backend and eager in float32."""


def tiny_pipeline(
    *,
    conditioning: Conditioning = "both",
    objective: Objective | None = None,
    image_size: tuple[int, int] = (32, 32),
    seed: int = 0,
) -> ClipDiTPipeline:
    """A pipeline of random networks, in which every part matters to the result.

    AutoencoderKL with 4 channels, 4 pixels a cell; DiT of 2 blocks, width 32; CLIP of 2 layers, 16 tokens. The objective is flow
    matching if none is given. PyTorch's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = _vae((8, 8, 16), norm_num_groups=4, mid_block_add_attention=False, scaling_factor=1.0)
        clip = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=24,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
                projection_dim=16,
            )
        )
        dit = DiT(
            latent_channels=4,
            width=32,
            depth=2,
            heads=2,
            conditioning=conditioning,
            clip_token_width=24,
            clip_embedding_width=16,
        )
        _wake(dit)
        for network in (dit, vae, clip):
            network.eval()  # as one that was loaded
        return ClipDiTPipeline(
            dit,
            vae,
            (objective or FlowMatching()).to_scheduler(),
            clip if conditioning != "concat" else None,
            latents_mean=[0.1, -0.1, 0.0, 0.2],
            latents_std=[0.5, 0.4, 0.6, 0.5],
            image_size=image_size,
            default_steps=4,
        )


def tiny_checkpoint(folder: Path, **options) -> Path:
    """`tiny_pipeline`, saved; returns the folder. Options as there."""
    save_checkpoint(tiny_pipeline(**options), folder)
    return folder


def full_size_checkpoint(folder: Path, experiment: TranslationExperiment) -> Path:
    """The networks of an experiment at the size that users train, with random weights; saved, returns the folder.

    The DiT is the experiment's; the VAE is Stable Diffusion's (84 M parameters, 8 pixels a cell, 4 channels), the image encoder
    CLIP ViT-L/14 (303 M). For speed and memory, which do not ask what the weights are; the images are none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = _vae((128, 256, 512, 512), layers_per_block=2)
        config = CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=224,
            patch_size=14,
            projection_dim=768,
        )
        clip = CLIPVisionModelWithProjection(config) if experiment.clip is not None else None
        dit = experiment.model.make(latent_channels=4, clip_token_width=1024, clip_embedding_width=768)
        _wake(dit)
        for network in (dit, vae, clip):
            if network is not None:
                network.eval()
        pipeline = ClipDiTPipeline(
            dit,
            vae,
            experiment.objective.to_scheduler(),
            clip,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            image_size=(experiment.pairs.size, experiment.pairs.size),
            default_steps=experiment.steps,
            default_guidance=experiment.guidance,
        )
        save_checkpoint(pipeline, folder)
    return folder


def _wake(dit: DiT) -> None:
    """What is zero at the start of training is random: such a network would ignore its condition."""
    for parameter in dit.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


def _vae(widths: tuple[int, ...], **options: Any) -> AutoencoderKL:
    """Stable Diffusion's kind of VAE, 4 channels: a level for each of `widths`, the sides halved after all but the last."""
    return AutoencoderKL(
        # diffusers writes tuple[str] where it means any length
        down_block_types=("DownEncoderBlock2D",) * len(widths),  # pyright: ignore[reportArgumentType]  (diffusers annotates tuples of one)
        up_block_types=("UpDecoderBlock2D",) * len(widths),  # pyright: ignore[reportArgumentType]  (diffusers annotates tuples of one)
        block_out_channels=widths,  # pyright: ignore[reportArgumentType]  (diffusers annotates tuples of one)
        latent_channels=4,
        **options,
    )
