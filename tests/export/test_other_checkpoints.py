"""Other sizes, autoencoders, latent channels, patches and objectives are exported as they are: nothing is made for one model."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from clipdit.diffusion import DDPM
from clipdit.model.dit import DiT
from clipdit.model.taef2 import Taef2
from clipdit.objective import Objective
from clipdit.pipeline import ClipDiTPipeline, save_checkpoint
from clipdit.testing import tiny_pipeline
from clipdit.translator import Translator
from clipdit_export.build import build
from clipdit_export.order import Order
from clipdit_export.precision.recipe import default_recipe


def pipeline(
    *,
    channels: int,
    patch: int,
    side: int,
    vae: object,
    conditioning: str = "both",
    objective: Objective | None = None,
    **changes,
) -> ClipDiTPipeline:
    """Random networks of other shapes than those of the other tests."""
    tiny = tiny_pipeline(conditioning=conditioning, objective=objective)  # pyright: ignore[reportArgumentType]  (parametrized words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        dit = DiT(
            latent_channels=channels,
            patch=patch,
            width=48,
            depth=3,
            heads=3,
            conditioning=conditioning,  # pyright: ignore[reportArgumentType]  (parametrized words)
            clip_token_width=24,
            clip_embedding_width=16,
            **changes,
        )
        for parameter in dit.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return ClipDiTPipeline(
        dit.eval(),
        vae,  # pyright: ignore[reportArgumentType]  (parametrized words)
        tiny.scheduler,
        tiny.image_encoder,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        image_size=(side, side + 32),
        default_steps=3,
    )


def tiny_autoencoder() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=8,
    ).eval()


CASES = {
    "TAEF2's 32 channels": lambda: pipeline(channels=32, patch=1, side=64, vae=Taef2().eval()),
    "patch 4": lambda: pipeline(channels=8, patch=4, side=32, vae=tiny_autoencoder(), conditioning="concat"),
    "noise prediction, CLIP alone": lambda: pipeline(
        channels=8, patch=2, side=32, vae=tiny_autoencoder(), conditioning="clip", objective=DDPM()
    ),
    "a gated MLP, RMSNorm": lambda: pipeline(channels=8, patch=2, side=32, vae=tiny_autoencoder(), mlp="swiglu", norm="rms"),
}


QUICK = "TAEF2's 32 channels"


@pytest.mark.parametrize("case", [case if case == QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_another_checkpoint_is_exported_with_the_same_images(case: str, tmp_path: Path):
    save_checkpoint(CASES[case](), tmp_path / "checkpoint")
    recipes = tuple(map(default_recipe, ("fp32", "int8")))
    manifest = build(tmp_path / "checkpoint", tmp_path / "bundle", Order(recipes=recipes, images=1))
    assert manifest.variants["onnx-int8"].audit["step"].counts["int8"] > 0
    height, width = manifest.model.native_size
    sources = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    eager = Translator.open(tmp_path / "checkpoint", backend="eager")(sources, seeds=[1, 2])
    onnx = Translator.open(tmp_path / "bundle", backend="onnx:onnx-fp32")(sources, seeds=[1, 2])
    assert (eager.int() - onnx.int()).abs().max() <= 1
