"""Training of the VAE: its crops, its losses, and a folder that diffusers opens."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from clipdit.images import to_float
from clipdit.model.autoencoder import Autoencoder, load_vae
from clipdit.train.autoencoder import AutoencoderSettings, AutoencoderTask
from clipdit.train.loop import TrainSettings, train
from clipdit.train.record import read_history

TINY = AutoencoderSettings(latent_channels=4, channels=(8, 8), crop=16, perceptual=None)


def fields(count: int, seed: int = 0) -> torch.Tensor:
    """(count, 2, 3, 24, 24): sources and targets of nine coloured fields."""
    small = torch.randint(0, 256, (count, 2, 3, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return small.repeat_interleave(8, 3).repeat_interleave(8, 4)


def make_task(settings: AutoencoderSettings = TINY, batch: int = 4, seed: int = 0) -> AutoencoderTask:
    return AutoencoderTask(settings, fields(6), fields(2, seed=1), batch, seed)


def train_settings(**changes) -> TrainSettings:
    return TrainSettings(**{"batch_size": 4, "warmup_steps": 2, "precision": "fp32", "log_every": 1, "save_every": 3, **changes})


def test_a_batch_holds_crops_of_both_sides_and_is_a_function_of_the_step():
    task = make_task(batch=12)
    one, two = task.draw(0), make_task(batch=12).draw(0)
    assert torch.equal(one["image"], two["image"]) and torch.equal(one["noise"], two["noise"])
    assert one["image"].shape == (12, 3, 16, 16) and one["noise"].shape == (12, 4, 8, 8)
    assert not torch.equal(one["image"], task.draw(1)["image"])
    images = fields(6).flatten(0, 1)

    def is_crop(crop: torch.Tensor, image: torch.Tensor) -> bool:
        windows = image.unfold(1, 16, 1).unfold(2, 16, 1)  # (3, 9, 9, 16, 16)
        return any((windows == way[:, None, None]).all((0, 3, 4)).any() for way in (crop, crop.flip(-1)))

    owners = [{i for i, image in enumerate(images) if is_crop(crop, image)} for crop in one["image"]]
    assert sorted(i for owner in owners for i in owner) == list(range(12))  # each image once: sources and targets


def test_whole_images_are_drawn_where_no_crop_is_asked_for():
    task = make_task(AutoencoderSettings(latent_channels=4, channels=(8, 8), crop=0, perceptual=None))
    assert task.draw(0)["image"].shape == (4, 3, 24, 24)


def test_recoloured_crops_are_the_same_fields_in_exchanged_colours_and_turned():
    task = make_task(replace(TINY, recolour=0.5), batch=12)
    batch, again = task.draw(3), make_task(replace(TINY, recolour=0.5), batch=12).draw(3)
    assert torch.equal(batch["image"], again["image"])
    originals = {tuple(sorted(colour)) for image in fields(6).flatten(0, 1) for colour in image.flatten(1).T.tolist()}
    seen = [{tuple(colour) for colour in crop.flatten(1).T.tolist()} for crop in batch["image"]]
    assert all(tuple(sorted(colour)) in originals for colours in seen for colour in colours)
    known = {tuple(colour) for image in fields(6).flatten(0, 1) for colour in image.flatten(1).T.tolist()}
    exchanged = sum(not colours <= known for colours in seen)
    assert 2 <= exchanged <= 10  # a half, less those whose order stayed by chance


def test_noise_on_latents_is_relative_to_their_spread():
    task = make_task(replace(TINY, latent_noise=0.5), batch=12)
    batch = task.draw(0)
    assert batch["strength"].shape == (12,) and batch["strength"].min() >= 0 and batch["strength"].max() <= 0.5
    assert batch["strength"].std() > 0.05
    seen = []
    task.vae.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    with torch.no_grad():
        batch["strength"] = torch.full((12,), 0.5)
        for part in (
            batch,
            {name: tensor for name, tensor in batch.items() if name != "strength"},
            batch | {"noise": 0 * batch["noise"]},
        ):
            task.module(part)
    noisy, plain, mean = seen
    spread = mean.std((0, 2, 3))
    added = ((noisy - mean).square() - (plain - mean).square()).mean((0, 2, 3)).sqrt()
    torch.testing.assert_close(added, 0.5 * spread, rtol=0.15, atol=0)  # 12 x 64 draws of noise a channel


def test_losses_are_what_they_are_called():
    task = make_task()
    batch = task.draw(0)
    with torch.no_grad():
        losses = task.module(batch)
        image = to_float(batch["image"])
        posterior = task.vae.encode(image).latent_dist
        output = task.vae.decode(posterior.mean + posterior.std * batch["noise"]).sample
    assert losses.keys() == {"l1", "kl", "mse"}
    torch.testing.assert_close(losses["l1"], (output - image).abs().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["mse"], (output - image).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)
    cells = posterior.mean.shape[-2] * posterior.mean.shape[-1]
    torch.testing.assert_close(losses["kl"], posterior.kl() / cells, rtol=1e-4, atol=1e-5)


def test_the_perceptual_network_judges_and_is_neither_trained_nor_saved(tmp_path: Path):
    settings = AutoencoderSettings(latent_channels=4, channels=(8, 8), crop=16, perceptual="efficientnet-lite0")
    task = make_task(settings)
    losses = task.module(task.draw(0))
    assert (losses["perceptual"] > 0).all()
    losses["perceptual"].sum().backward()
    assert task.module.perceptual is not None
    assert all(p.grad is None for p in task.module.perceptual.parameters())
    assert all(p.grad is not None and p.grad.any() for p in task.vae.decoder.parameters())
    task.save(tmp_path)
    assert load_vae(tmp_path).state_dict().keys() == task.vae.state_dict().keys()


def test_a_resumed_training_is_bitwise_the_uninterrupted_one(tmp_path: Path):
    """The VAE lies in memory channels last; its optimiser's moments must, too."""
    half, full = ({"schedule": "constant", "steps": steps} for steps in (3, 6))
    whole, again = make_task(), make_task()
    train(whole, train_settings(**full), tmp_path / "whole", experiment={"train": full})
    train(make_task(), train_settings(**half), tmp_path / "broken", experiment={"train": half})
    train(again, train_settings(**full), tmp_path / "broken", experiment={"train": full}, resume=True)
    for one, other in zip(whole.vae.parameters(), again.vae.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    names = ("step", "loss/l1", "loss/kl", "gradient_norm")
    rows = [[[row[name] for name in names] for row in read_history(tmp_path / run)] for run in ("whole", "broken")]
    assert rows[0] == rows[1]


def test_it_learns_and_diffusers_opens_what_it_saved(tmp_path: Path):
    task = make_task(batch=8)
    train(task, train_settings(steps=30, batch_size=8, lr=1e-2, log_every=5, save_every=1000), tmp_path, experiment={})
    losses = [row["loss/l1"] for row in read_history(tmp_path)]
    assert losses[-1] < 0.9 * losses[0]
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    image = to_float(fields(2, seed=1)[:, 1])
    autoencoder = Autoencoder(load_vae(tmp_path))
    with torch.no_grad():
        latent = autoencoder.encode(image)
        assert latent.shape == (2, 4, 12, 12)
        # one image at a time, channels last: another order of summation
        torch.testing.assert_close(latent, vae.encode(image).latent_dist.mode(), rtol=1e-4, atol=1e-5)
        errors = [(autoencoder.decode(z) - image).abs().mean() for z in (latent, torch.zeros_like(latent))]
    assert errors[0] < errors[1]  # the latent says something of the image


def test_the_sheet_shows_images_beside_their_reconstructions(tmp_path: Path):
    make_task().sheet(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width > 2 * 128


def test_a_fresh_vae_has_the_shape_that_was_asked_for():
    vae = AutoencoderSettings(latent_channels=5, channels=(8, 16, 24)).make(64)
    assert isinstance(vae, nn.Module)
    autoencoder = Autoencoder(vae)
    assert (autoencoder.downscale, autoencoder.latent_channels) == (4, 5)
    assert AutoencoderSettings(channels=(8, 16, 24)).downscale == 4


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"channels": ()}, r"model.channels are \(\); wanted multiples of 8"),
        ({"channels": (8, 12)}, r"model.channels are \(8, 12\); wanted multiples of 8"),
        ({"channels": (0,)}, r"model.channels are"),
        ({"latent_channels": 0}, r"model.latent_channels is 0; wanted at least 1"),
        ({"layers": 0}, r"model.layers is 0"),
        ({"crop": -8}, r"model.crop is -8; wanted 0 or more"),
        ({"crop": 20}, r"model.crop is 20; wanted a multiple of 8, the pixels of a latent cell"),
        ({"kl_weight": -1.0}, r"model.kl_weight is -1.0"),
        ({"perceptual_weight": -1.0}, r"model.perceptual_weight is -1.0"),
        ({"latent_noise": -0.1}, r"model.latent_noise is -0.1; wanted 0 or more"),
        ({"recolour": 1.1}, r"model.recolour is 1.1; wanted a share in \[0, 1\]"),
    ],
)
def test_impossible_settings_are_refused_by_name(change: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        AutoencoderSettings(**change)
