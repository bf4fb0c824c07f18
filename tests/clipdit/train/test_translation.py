"""Training of the DiT: what a batch holds, what the dropout withholds, when the pixel losses look, and that it learns."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from clipdit.backend import Condition
from clipdit.data.pairs import find_pairs
from clipdit.diffusion import DDPM
from clipdit.flow import FlowMatching
from clipdit.images import to_float
from clipdit.model.dit import DiT
from clipdit.objective import Objective
from clipdit.pipeline import load_checkpoint
from clipdit.train.loop import train
from clipdit.train.record import read_history
from clipdit.train.runs import translation_task
from clipdit.train.translation import LossSettings, TranslationModule, TranslationTask


@pytest.fixture
def make_task(tiny_experiment, pairs_folder: Path, tmp_path: Path) -> Callable[..., TranslationTask]:
    """The task of a tiny experiment with changes; all share a cache."""
    found = find_pairs(pairs_folder)

    def make(**changes) -> TranslationTask:
        experiment = tiny_experiment(**changes)
        experiment = replace(experiment, pairs=replace(experiment.pairs, cache=tmp_path / "cache"))
        return translation_task(experiment, found.split("train"), found.split("val"), tmp_path)

    return make


def answering(dit: DiT, answer: Callable[[Tensor, Tensor], Tensor]) -> list[Condition]:
    """Makes the DiT answer what it is told to; returns the list of conditions that it will be given."""
    asked = []

    def forward(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        asked.append(condition)
        return answer(x, t)

    dit.forward = forward
    return asked


class Squared(nn.Module):
    """A perceptual distance without weights: the mean squared difference."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean((1, 2, 3))


def test_a_batch_is_a_function_of_the_step_and_the_seed(make_task):
    one, two = make_task().draw(5), make_task().draw(5)
    assert one.keys() == two.keys() == {"target", "source", "tokens", "pooled", "time", "noise", "keep"}
    assert all(torch.equal(one[name], two[name]) for name in one)
    for other in (make_task().draw(6), make_task(train={"seed": 1}).draw(5)):
        assert not torch.equal(one["noise"], other["noise"])
        assert not torch.equal(one["time"], other["time"])


def test_source_and_features_belong_to_the_target(make_task, pairs_folder):
    task = make_task()
    pairs = {pair.id: pair for pair in find_pairs(pairs_folder).split("train")}
    known = []  # of every pair, and of its mirror image: latents and embedding
    for pair in pairs.values():
        for images in (pair.read(), [image.flip(-1) for image in pair.read()]):
            source, target = (to_float(image[None]) for image in images)
            with torch.no_grad():
                assert task.clip is not None
                latents = (task.autoencoder.encode(target)[0], task.autoencoder.encode(source)[0])
                known.append((*latents, task.clip(source)[1][0]))
    seen = set()
    for step in range(6):
        batch = task.draw(step)
        for i in range(4):
            errors = torch.stack([(target - batch["target"][i]).abs().max() for target, _, _ in known])
            nearest = int(errors.argmin())
            seen.add(nearest)
            _, source, pooled = known[nearest]
            assert errors[nearest] < 5e-3  # float16 in the cache
            torch.testing.assert_close(batch["source"][i], source, atol=5e-3, rtol=0)
            torch.testing.assert_close(batch["pooled"][i], pooled, atol=5e-3, rtol=0)
    assert len(seen) >= 12  # 24 drawn from 12 pairs in two views, each pair twice


def test_without_clip_no_features_are_drawn(make_task):
    task = make_task(model={"conditioning": "concat"}, clip=None)
    assert task.draw(0).keys() == {"target", "source", "time", "noise", "keep"}
    assert task.pipeline.image_encoder is None


def test_dropout_withholds_the_whole_condition_of_an_image(make_task):
    task = make_task()
    batch = task.draw(0) | {"keep": torch.tensor([True, False, False, True])}
    asked = answering(task.dit, lambda x, t: torch.zeros_like(x))
    task.module(batch)
    given = {"tokens": batch["tokens"], "pooled": batch["pooled"], "latent": batch["source"]}
    for name, tensor in given.items():
        seen = getattr(asked[0], name)
        assert torch.equal(seen[[0, 3]], tensor[[0, 3]])
        assert not seen[[1, 2]].any()
        assert tensor[[1, 2]].any()


@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
def test_dropout_is_as_frequent_as_asked(make_task, drop):
    task = make_task(drop_condition=drop)
    kept = torch.cat([task.draw(step)["keep"] for step in range(100)])
    assert (~kept).float().mean().item() == pytest.approx(drop, abs=0.08 if 0 < drop < 1 else 0)


@pytest.mark.parametrize("objective", [FlowMatching(), DDPM()])
def test_the_loss_is_the_squared_error_of_what_the_objective_wants(make_task, objective: Objective):
    task = make_task(objective=objective)
    batch = task.draw(3)
    noised = objective.noised(batch["target"], batch["noise"], batch["time"])
    answering(task.dit, lambda x, t: noised.prediction_target + 2)
    assert task.module(batch)["reconstruction"].tolist() == pytest.approx([4.0] * 4, rel=1e-5)
    assert task.weights == {"reconstruction": 1.0}


LOOKING = LossSettings(clip_similarity=0.5, perceptual=2.0, gate=0.6, fraction=0.5, crop=4)


def looking(task: TranslationTask, loss: LossSettings = LOOKING) -> TranslationModule:
    return TranslationModule(task.dit, task.objective, loss, autoencoder=task.autoencoder, clip=task.clip, perceptual=Squared())


def looked_at(task: TranslationTask, **changes) -> dict[str, Tensor]:
    """A batch of which the pixel losses look at the second image alone: the first is too noisy, the third was not chosen."""
    return task.draw(0) | {
        "time": torch.tensor([0.59, 0.61, 0.9, 0.1]),
        "look": torch.tensor([True, True, False, True]),
        "corner": torch.rand(4, 2, generator=torch.Generator().manual_seed(0)),
        **changes,
    }


def test_pixel_losses_look_at_chosen_images_with_little_noise_only(make_task):
    task = make_task()
    losses = looking(task)(looked_at(task))
    assert losses.keys() == {"reconstruction", "clip_similarity", "perceptual"}
    for name in ("clip_similarity", "perceptual"):
        assert losses[name][[0, 2, 3]].tolist() == [0.0, 0.0, 0.0]
        assert losses[name][1] > 1e-4
    assert (losses["reconstruction"] > 0).all()
    # the factors do not depend on the share that is looked at
    twice = looking(task, replace(LOOKING, fraction=0.25))(looked_at(task))
    torch.testing.assert_close(twice["perceptual"], 2 * losses["perceptual"])
    assert torch.equal(twice["reconstruction"], losses["reconstruction"])


def test_pixel_losses_are_zero_where_the_prediction_is_right(make_task):
    task = make_task()
    batch = looked_at(task)
    noised = task.objective.noised(batch["target"], batch["noise"], batch["time"])
    answering(task.dit, lambda x, t: noised.prediction_target)
    for name, values in looking(task)(batch).items():
        assert values.abs().max() < 1e-4, name


def test_pixel_losses_train_the_dit_and_nothing_else(make_task):
    task = make_task()
    module = looking(task)
    losses = module(looked_at(task))
    (losses["clip_similarity"] + losses["perceptual"]).sum().backward()
    assert task.dit.latent_out.weight.grad is not None and task.dit.latent_out.weight.grad.any()
    for frozen in (task.pipeline.vae, task.pipeline.image_encoder):
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())


def test_pixel_losses_that_look_at_nothing_are_zero_and_still_part_of_the_graph(make_task):
    """On several processes all must have gradients, also one whose share of the batch holds no image to look at."""
    task = make_task()
    losses = looking(task)(looked_at(task, look=torch.zeros(4, dtype=torch.bool)))
    assert losses["perceptual"].tolist() == losses["clip_similarity"].tolist() == [0.0] * 4
    losses["perceptual"].mean().backward()
    assert task.dit.latent_out.weight.grad is not None and not task.dit.latent_out.weight.grad.any()


def test_images_are_chosen_for_the_pixel_losses_as_often_as_asked(make_task):
    task = make_task(loss=LossSettings(perceptual=0.1, perceptual_network="efficientnet-lite0", fraction=0.25))
    chosen = torch.cat([task.draw(step)["look"] for step in range(100)]).float().mean().item()
    assert chosen == pytest.approx(0.25, abs=0.07)
    assert task.weights == {"reconstruction": 1.0, "perceptual": 0.1}


def test_a_similarity_without_clip_is_refused(make_task):
    task = make_task()
    with pytest.raises(ValueError, match=r"loss.clip_similarity needs a CLIP image encoder; give --clip, or set it to 0"):
        TranslationModule(task.dit, task.objective, LossSettings(clip_similarity=1.0), autoencoder=task.autoencoder)


@pytest.mark.parametrize(
    "change",
    [{"reconstruction": -1.0}, {"clip_similarity": -0.1}, {"perceptual": -1.0}, {"gate": 1.1}, {"fraction": -0.1}, {"crop": -1}],
)
def test_impossible_loss_settings_are_refused_by_name(change: dict):
    (name,) = change
    with pytest.raises(ValueError, match=rf"loss.{name} is .*; wanted"):
        LossSettings(**change)


def test_the_saved_folder_is_a_checkpoint_with_the_weights_of_now(make_task, tmp_path: Path):
    task = make_task()
    task.save(tmp_path / "run")
    with torch.no_grad():
        task.dit.latent_out.weight.fill_(0.125)
    task.save(tmp_path / "run")
    pipeline = load_checkpoint(tmp_path / "run")
    assert (pipeline.transformer.latent_out.weight == 0.125).all()
    assert pipeline.config.latents_mean == pytest.approx(task.cache.statistics.mean)
    assert pipeline.native_size == (32, 32)
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("conditioning", ["both", "concat"])
def test_the_sheet_shows_held_out_pairs_and_leaves_no_trace_in_training(make_task, tmp_path: Path, conditioning: str):
    task = make_task(model={"conditioning": conditioning})
    state = torch.get_rng_state()
    task.sheet(tmp_path / "sheet.png")
    task.sheet(tmp_path / "again.png")
    assert torch.equal(torch.get_rng_state(), state)
    assert (tmp_path / "sheet.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width > 4 * 112  # source, two samples, target
        assert picture.height > 2 * 112


def test_it_learns_twelve_pairs(make_task, tiny_experiment, tmp_path: Path):
    settings = {"steps": 80, "batch_size": 12, "lr": 5e-3, "warmup_steps": 10, "log_every": 10, "save_every": 1000}
    train(make_task(train=settings), tiny_experiment(train=settings).train, tmp_path / "run", experiment={})
    losses = [row["loss/reconstruction"] for row in read_history(tmp_path / "run")]
    assert losses[-1] < 0.85 * losses[0], losses
