"""Training of a VAE, or of a decoder alone: the crops, the losses, what stays, and a folder that opens."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image

from clipdit.images import to_float
from clipdit.model.autoencoder import VAE, Autoencoder, load_vae
from clipdit.model.taef2 import Taef2
from clipdit.train.autoencoder import AutoencoderSettings, AutoencoderTask, DecoderSettings, variance_of_side
from clipdit.train.loop import TrainSettings, train
from clipdit.train.record import read_history

FRESH = AutoencoderSettings(latent_channels=4, channels=(8, 8), crop=16, perceptual=None, recolour=0)
DECODER = DecoderSettings(crop=16, perceptual=None, recolour=0)


def kl() -> VAE:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4)


def tiny() -> VAE:
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4)


def taef2() -> VAE:
    return Taef2(latent_channels=4, encoder_block_out_channels=(64,) * 4)


def fields(count: int, seed: int = 0) -> torch.Tensor:
    """(count, 2, 3, 24, 24): dark sources and light targets of sixty-four coloured fields."""
    small = torch.randint(0, 100, (count, 2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    small[:, 1] += 150
    return small.repeat_interleave(3, 3).repeat_interleave(3, 4)


def make_task(settings: DecoderSettings = FRESH, vae: VAE | None = None, batch: int = 8) -> AutoencoderTask:
    return AutoencoderTask(settings, fields(12), fields(2, seed=1), batch, 0, vae)


def train_settings(**changes) -> TrainSettings:
    return TrainSettings(**{"batch_size": 8, "warmup_steps": 2, "precision": "fp32", "log_every": 1, "save_every": 3, **changes})


@pytest.mark.parametrize("share, sources", [(0.0, 0), (0.25, 2), (1.0, 8)])
def test_a_batch_holds_its_share_of_sources_in_random_places_and_is_a_function_of_the_step(share: float, sources: int):
    task, again = (make_task(replace(FRESH, source_share=share)) for _ in range(2))
    drawn = [task.draw(step) for step in range(4)]
    for step, batch in enumerate(drawn):
        assert all(torch.equal(tensor, again.draw(step)[name]) for name, tensor in batch.items())
        assert batch["image"].shape == (8, 3, 16, 16) and batch["noise"].shape == (8, 4, 8, 8)
        assert batch["strength"].min() >= 0 and batch["strength"].max() <= 0.2
        assert torch.equal(batch["is_source"], batch["image"].flatten(1).max(1).values < 100)
    assert max(batch["strength"].max() for batch in drawn) > 0.15
    places = [tuple(batch["is_source"].tolist()) for batch in drawn]
    assert [sum(place) for place in places] == 4 * [sources]
    assert len(set(places)) == (1 if share in (0, 1) else 4)
    assert not torch.equal(drawn[0]["image"], drawn[1]["image"])


@pytest.mark.parametrize("settings, make", [(FRESH, None), (DECODER, kl), (DECODER, tiny)])
def test_losses_are_what_they_are_called_and_noise_is_relative_to_the_deviation_of_latents_of_that_side(settings, make):
    task = make_task(settings, make and make())
    batch = task.draw(0)
    image, autoencoder, variance = to_float(batch["image"]), task.module.autoencoder, torch.zeros(())
    with torch.no_grad():
        losses = task.module(batch)
        latent = autoencoder.encode(image)
        if make is None:
            variance = task.vae.encode(image).latent_dist.var
            torch.testing.assert_close(losses.pop("kl"), task.vae.encode(image).latent_dist.kl() / 64, rtol=1e-3, atol=1e-4)
        deviation = torch.ones_like(latent) * batch["strength"][:, None, None, None]
        for side in (batch["is_source"], ~batch["is_source"]):
            if side.any():
                deviation[side] *= latent[side].std((0, 2, 3))[:, None, None]
        output = autoencoder.decode(latent + (variance + deviation.square()).sqrt() * batch["noise"])
    assert losses.keys() == {"l1", "mse"}
    torch.testing.assert_close(losses["l1"], (output - image).abs().mean((1, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(losses["mse"], (output - image).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sources", [[], [1, 2, 5], [0, 1, 2, 3, 4, 5]])
def test_sources_far_from_targets_gain_nothing(sources: list[int]):
    """The variance is that of one side, wherever the other side is."""
    latent = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    is_source = torch.zeros(6, dtype=torch.bool)
    is_source[sources] = True
    latent[sources] = 5 * latent[sources] + 100
    variance = variance_of_side(latent, is_source)
    for side in (is_source, ~is_source):
        if side.any():
            torch.testing.assert_close(variance[side], latent[side].var((0, 2, 3)).expand(int(side.sum()), -1), rtol=1e-4, atol=0)


def test_an_adversary_learns_beside_the_decoder(tmp_path: Path):
    task = make_task(replace(DECODER, adversary_weight=0.02, latent_noise=1.0), kl())
    train(task, train_settings(steps=30, lr=3e-4), tmp_path, experiment={})
    first, *_, last = [row["loss/discriminator"] for row in read_history(tmp_path)]
    assert first == pytest.approx(2, abs=0.5) and last < 0.7 * first
    assert load_vae(tmp_path).state_dict().keys() == kl().state_dict().keys()  # it stays behind


@pytest.mark.parametrize("make", [kl, tiny, taef2])
def test_a_decoder_learns_and_the_latents_stay_what_they_were(make, tmp_path: Path):
    torch.manual_seed(0)
    vae = make()
    image = to_float(fields(4, seed=2)[:, 1])
    with torch.no_grad():
        before = Autoencoder(vae).encode(image)
        worse = (Autoencoder(vae).decode(before) - image).abs().mean()
    train(make_task(DECODER, vae), train_settings(steps=20, lr=1e-3), tmp_path, experiment={})
    after = Autoencoder(load_vae(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(after.encode(image), before, rtol=0, atol=1e-6)  # here it lies channels last
        assert (after.decode(before) - image).abs().mean() < 0.9 * worse
    for name, parameter in load_vae(tmp_path).encoder.state_dict().items():
        assert torch.equal(parameter, vae.encoder.state_dict()[name])


def test_a_fresh_vae_learns_on_both_sides_and_opens_from_its_folder(tmp_path: Path):
    task = make_task(replace(FRESH, latent_noise=0.0))
    encoder = [parameter.clone() for parameter in task.vae.encoder.parameters()]
    train(task, train_settings(steps=60, lr=6e-3, log_every=5, save_every=1000), tmp_path, experiment={})
    losses = [row["loss/l1"] for row in read_history(tmp_path)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(one, other) for one, other in zip(encoder, task.vae.encoder.parameters(), strict=True))
    image = to_float(fields(2, seed=1)[:, 1])
    autoencoder = Autoencoder(load_vae(tmp_path))
    with torch.no_grad():
        latent = autoencoder.encode(image)
        assert latent.shape == (2, 4, 12, 12)
        errors = [(autoencoder.decode(z) - image).abs().mean() for z in (latent, torch.zeros_like(latent))]
    assert errors[0] < errors[1]  # the latent says something of the image


def test_a_vae_that_is_there_is_trained_on_encoder_and_all(tmp_path: Path):
    torch.manual_seed(1)
    given = FRESH.make()
    began = {name: weight.clone() for name, weight in given.state_dict().items()}
    train(make_task(FRESH, given), train_settings(steps=1, lr=1e-5, warmup_steps=0), tmp_path, experiment={})
    trained = load_vae(tmp_path).state_dict()
    for name, weight in trained.items():
        torch.testing.assert_close(weight, began[name], rtol=0, atol=1.1e-5)  # Adam's first step is the learning rate
    assert any(not torch.equal(trained[name], began[name]) for name in trained if name.startswith("encoder."))


@pytest.mark.parametrize(
    "vae, reason",
    [
        (kl, r"the VAE of --init has norm_num_groups 4, this run 8; they must be the same"),
        (replace(FRESH, channels=(8, 16)).make, r"has block_out_channels \(8, 16\), this run \(8, 8\); they must be the same"),
        (tiny, "the VAE of --init is an AutoencoderTiny; wanted an AutoencoderKL"),
    ],
)
def test_a_vae_that_is_built_otherwise_is_not_trained_on(vae, reason: str):
    with pytest.raises(ValueError, match=reason):
        make_task(FRESH, vae())


def test_the_perceptual_network_judges_every_fourth_crop_for_all_and_is_neither_trained_nor_saved(tmp_path: Path):
    task = make_task(replace(DECODER, perceptual="efficientnet-lite0"), kl())
    losses = task.module(task.draw(0))
    assert [bool(value > 0) for value in losses["perceptual"]] == 2 * [True, False, False, False]
    losses["perceptual"].sum().backward()
    assert task.module.perceptual is not None
    assert all(p.grad is None for p in task.module.perceptual.parameters())
    assert all(p.grad is None for p in task.vae.encoder.parameters())
    assert any(p.grad is not None and p.grad.any() for p in task.vae.decoder.parameters())
    with torch.no_grad():
        judged = task.module({name: tensor[::4] for name, tensor in (task.draw(0) | {"strength": torch.zeros(8)}).items()})
    assert judged["perceptual"].shape == (2,)
    task.save(tmp_path)
    assert load_vae(tmp_path).state_dict().keys() == task.vae.state_dict().keys()


@pytest.mark.parametrize("settings, make", [(FRESH, None), (DECODER, kl)])
def test_a_resumed_training_is_bitwise_the_uninterrupted_one(settings, make, tmp_path: Path):
    """The VAE lies in memory channels last; its optimiser's moments must, too."""

    def begin() -> AutoencoderTask:
        torch.manual_seed(0)
        return make_task(settings, make and make())

    half, full = ({"schedule": "constant", "steps": steps} for steps in (3, 6))
    whole, again = begin(), begin()
    train(whole, train_settings(**full), tmp_path / "whole", experiment={"train": full})
    train(begin(), train_settings(**half), tmp_path / "broken", experiment={"train": half})
    train(again, train_settings(**full), tmp_path / "broken", experiment={"train": full}, resume=True)
    for one, other in zip(whole.vae.parameters(), again.vae.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    rows = [[[row[name] for name in ("step", "loss/l1", "gradient_norm")] for row in read_history(tmp_path / run)]
            for run in ("whole", "broken")]  # fmt: skip
    assert rows[0] == rows[1]


def test_the_sheet_shows_images_beside_their_reconstructions_at_the_start_and_now(tmp_path: Path):
    make_task().sheet(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width > 3 * 128


def test_whole_images_are_drawn_where_no_crop_is_asked_for():
    assert make_task(replace(FRESH, crop=0)).draw(0)["image"].shape == (8, 3, 24, 24)


def test_the_network_is_the_one_that_was_asked_for():
    settings = AutoencoderSettings(latent_channels=5, channels=(8, 16, 16))
    autoencoder = Autoencoder(settings.make())
    assert (autoencoder.downscale, autoencoder.latent_channels, settings.downscale) == (4, 5, 4)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"channels": ()}, r"model.channels are \(\); wanted multiples of 8, one for each resolution"),
        ({"channels": (8, 12)}, r"model.channels are \(8, 12\); wanted multiples of 8"),
        ({"latent_channels": 0}, r"model.latent_channels is 0; wanted at least 1"),
        ({"layers": 0}, r"model.layers is 0; wanted at least 1"),
        ({"crop": -8}, r"model.crop is -8; wanted 0 or more"),
        ({"perceptual_weight": -1.0}, r"model.perceptual_weight is -1.0"),
        ({"latent_noise": -0.1}, r"model.latent_noise is -0.1; wanted 0 or more"),
        ({"kl_weight": -0.1}, r"model.kl_weight is -0.1; wanted 0 or more"),
        ({"adversary_weight": -0.1}, r"model.adversary_weight is -0.1; wanted 0 or more"),
        ({"recolour": 1.1}, r"model.recolour is 1.1; wanted a share in \[0, 1\]"),
        ({"source_share": -0.1}, r"model.source_share is -0.1; wanted a share in \[0, 1\]"),
    ],
)
def test_impossible_settings_are_refused_by_name(change: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        replace(FRESH, **change)


def test_crops_that_do_not_divide_into_cells_are_refused():
    with pytest.raises(ValueError, match=r"model.crop is 15, pairs.size 24; wanted multiples of 2, the pixels of a latent cell"):
        make_task(replace(FRESH, crop=15))
