"""Training against a discriminator: the published losses, who learns by what, and a folder that translates."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clipdit.cli import main
from clipdit.data.augment import Augment
from clipdit.data.pairs import find_pairs
from clipdit.experiment import AdversarialExperiment, PairSettings
from clipdit.images import to_float
from clipdit.pipeline import load_checkpoint
from clipdit.presets import pix2pix, pix2pixhd
from clipdit.train.adversarial import (
    AdversarialModule,
    AdversarialTask,
    AdversarySettings,
    GlobalGeneratorSettings,
    UNetSettings,
    feature_distance,
    verdict,
)
from clipdit.train.loop import TrainSettings, train
from clipdit.train.record import read_history
from clipdit.train.runs import adversarial_task
from clipdit.translator import Translator

SMALL = UNetSettings(width=4, levels=4)
HD = AdversarySettings(contest="least-squares", l1=0, feature_matching=10, scales=2, affine=False, padding=2, width=4)


@pytest.fixture
def make_task(pairs_folder: Path):
    found = find_pairs(pairs_folder)

    def make(loss: AdversarySettings | None = None, model=SMALL, batch: int = 4, seed: int = 0) -> AdversarialTask:
        experiment = AdversarialExperiment(
            pairs=PairSettings(size=32, augment=Augment(jitter=0.1)),
            model=model,
            loss=loss or AdversarySettings(width=4),
            train=TrainSettings(batch_size=batch, seed=seed),
        )
        return adversarial_task(experiment, found.split("train"), found.split("val"))

    return make


def test_a_batch_is_a_function_of_the_step_and_the_seed(make_task):
    one, same, next_one, other = make_task().draw(3), make_task().draw(3), make_task().draw(4), make_task(seed=1).draw(3)
    assert one.keys() == {"source", "target", "noise"}
    assert one["source"].shape == one["target"].shape == one["noise"].shape == (4, 3, 32, 32)
    for name in one:
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], next_one[name]) and not torch.equal(one[name], other[name])


def test_source_and_target_are_moved_alike(make_task):
    task = make_task()
    for pixels in task.store:
        pixels[1] = pixels[0]
    for step in range(3):
        batch = task.draw(step)
        assert torch.equal(batch["source"], batch["target"])


def test_the_losses_are_the_published_ones(make_task):
    task = make_task()
    batch, module = task.draw(0), task.module
    losses = module(batch)
    with torch.no_grad():
        source, target = to_float(batch["source"]), to_float(batch["target"])
        output = task.generator.generate(source, batch["noise"])
        (judge,) = module.discriminator.judges
        made, real = judge(torch.cat((source, output), 1))[-1], judge(torch.cat((source, target), 1))[-1]
    torch.testing.assert_close(losses["l1"], (output - target).abs().mean((1, 2, 3)))
    torch.testing.assert_close(losses["adversary"], F.softplus(-made).mean((1, 2, 3)))  # -log D(made)
    by_hand = 0.5 * (F.softplus(-real).mean((1, 2, 3)) + F.softplus(made).mean((1, 2, 3)))
    torch.testing.assert_close(losses["discriminator"], by_hand)
    assert task.weights == {"l1": 100.0, "adversary": 1.0, "discriminator": 1.0}


def test_each_network_learns_by_its_own_losses_alone(make_task):
    task = make_task(HD)
    losses = task.module(task.draw(0))
    assert losses.keys() == {"l1", "adversary", "discriminator", "feature_matching"}
    for name, learns, rests in (
        ("discriminator", task.module.discriminator, task.generator),
        ("adversary", task.generator, task.module.discriminator),
        ("feature_matching", task.generator, task.module.discriminator),
    ):
        task.module.zero_grad(set_to_none=True)
        losses[name].sum().backward(retain_graph=True)
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in learns.parameters()), name
        assert all(p.grad is None for p in rests.parameters()), name


def test_least_squares_and_scales():
    scores = [torch.tensor([[[[0.0, 1.0]]], [[[3.0, 3.0]]]]), torch.tensor([[[[1.0]]], [[[0.0]]]])]
    assert verdict(scores, True, "least-squares").tolist() == [0.5, 5.0]
    assert verdict(scores, False, "least-squares").tolist() == [1.5, 9.0]
    assert verdict(scores[:1], True, "cross-entropy")[1].item() == pytest.approx(math.log1p(math.exp(-3)))


def test_feature_matching_leaves_the_scores_out_and_weighs_layers_as_the_published_code():
    def layers(value: float) -> list[torch.Tensor]:
        return [torch.full((2, 1, 2, 2), value), torch.full((2, 3, 1, 1), 2 * value), torch.full((2, 1, 1, 1), 100 * value)]

    distance = feature_distance([layers(1.0), layers(2.0)], [layers(0.0), layers(0.0)])
    assert distance.tolist() == pytest.approx([((1 + 2) + (2 + 4)) * 4 / 2 / 2] * 2)


def test_patches_of_the_published_discriminator_are_70_pixels_wide(make_task):
    torch.manual_seed(0)
    (judge,) = AdversarySettings(width=2).make().judges
    widths = [stage[0].out_channels for stage in list(judge.stages)[:-1]]
    assert widths == [2, 4, 8, 16]
    for stage in list(judge.stages)[:-1]:  # norms look at the whole image: without them, what a score sees is its patch
        if len(stage) == 3:
            stage[1] = torch.nn.Identity()
    image = torch.zeros(1, 6, 256, 256, requires_grad=True)
    scores = judge(image)[-1]
    assert scores.shape == (1, 1, 30, 30)
    scores[0, 0, 15, 15].backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()[:, 0]
    assert int(rows.max() - rows.min()) + 1 == 70


def test_without_a_discriminator_it_is_a_regression(make_task):
    task = make_task(AdversarySettings(adversary=0.0))
    assert task.module.discriminator is None and task.weights == {"l1": 100.0}
    assert task.module(task.draw(0)).keys() == {"l1"}


def test_it_learns_what_can_be_learnt(make_task, tmp_path):
    """That the target is the source, in sixty steps."""
    task = make_task(AdversarySettings(width=4), UNetSettings(width=8, levels=4))
    for pixels in task.store:
        pixels[1] = pixels[0]
    settings = TrainSettings(
        steps=60, batch_size=4, lr=2e-3, betas=(0.5, 0.999), warmup_steps=0, ema_decay=0.0, clip_norm=1e9, precision="fp32",
        log_every=10, save_every=60, sheet_every=60, weight_decay=0.0,
    )  # fmt: skip
    train(task, settings, tmp_path / "run", experiment={})
    rows = read_history(tmp_path / "run")
    assert rows[-1]["loss/l1"] < 0.6 * rows[0]["loss/l1"]
    # nobody gains by both: the sum of what is minimised leaves the contest out
    assert rows[-1]["loss/total"] == pytest.approx(100 * rows[-1]["loss/l1"], rel=1e-4)


@pytest.mark.parametrize("preset", ["pix2pix", "pix2pixhd"])
def test_a_run_is_a_checkpoint_of_one_step_that_translates_and_goes_on(pairs_folder, tmp_path, preset, capsys):
    out = tmp_path / "run"
    words = ["train", preset, "--data", pairs_folder, "--out", out, "--pairs.size", "32", "--train.batch-size", "2"]
    words += ["--model.width", "2", "--loss.width", "2", "--train.precision", "fp32"]
    words += ["--model.levels", "4"] if preset == "pix2pix" else ["--model.residuals", "1", "--model.downs", "2"]
    words += ["--loss.perceptual", "0"] if preset == "pix2pixhd" else []
    assert main([str(word) for word in [*words, "--train.steps", "2"]]) == 0
    first = load_checkpoint(out).transformer.state_dict()
    assert "image-to-image" in (out / "README.md").read_text() and "diffusion" not in (out / "README.md").read_text()
    with Translator.open(out, device="cpu") as translator:
        assert translator.defaults.steps == 1 and translator.backend.limits.downscale == 1
        image = torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8)
        assert translator.translate_image(image, seed=3).shape == (3, 40, 30)
        with pytest.raises(ValueError, match=r"makes its image in one\. Use 1"):
            translator.translate_image(image, steps=20)
    assert main([str(word) for word in [*words, "--train.steps", "4", "--resume"]]) == 0
    assert any(not torch.equal(tensor, first[name]) for name, tensor in load_checkpoint(out).transformer.state_dict().items())


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [(UNetSettings(levels=6), 96, "multiple of 64"), (GlobalGeneratorSettings(), 24, "multiple of 16"), (UNetSettings(), 50, "")],
)
def test_sizes(model, size, message):
    if message:
        with pytest.raises(ValueError, match=message):
            model.make(size)
    else:
        with pytest.raises(ValueError, match="multiple of 4"):
            model.make(size)


def test_the_unet_goes_down_to_a_single_cell():
    assert [UNetSettings(width=1).make(side).config["levels"] for side in (32, 128, 256, 512, 96)] == [5, 7, 8, 8, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"l1": -1.0}, "loss.l1 is -1"), ({"scales": 0}, "at least 1"), ({"l1": 0.0, "adversary": 0.0}, "all factors")],
)
def test_settings_that_teach_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AdversarySettings(**changes)


def test_presets_hold_the_published_constants():
    for preset in (pix2pix(), pix2pixhd()):
        assert (preset.train.lr, preset.train.betas, preset.train.weight_decay) == (2e-4, (0.5, 0.999), 0.0)
        assert preset.pairs.size == 256 and preset.pairs.augment.jitter == 30 / 256 and preset.pairs.augment.flip
        assert (preset.loss.width, preset.loss.layers, preset.model.width) == (64, 3, 64)
    ours, hd = pix2pix(), pix2pixhd()
    assert (ours.loss.l1, ours.loss.contest, ours.model.make(256).config["levels"]) == (100.0, "cross-entropy", 8)
    assert (hd.loss.feature_matching, hd.loss.perceptual, hd.loss.scales, hd.loss.contest) == (10.0, 10.0, 2, "least-squares")
    assert (hd.model.downs, hd.model.residuals, hd.train.schedule) == (4, 9, "linear")


def test_the_module_holds_no_judge_that_it_does_not_ask():
    module = AdversarialModule(SMALL.make(32), AdversarySettings(width=4))
    assert module.perceptual is None
