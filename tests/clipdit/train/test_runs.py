"""From a preset and a folder to a run folder: what is in it, what is refused, and that every recipe trains."""

import json
import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipdit.backend import Condition
from clipdit.data.augment import Augment
from clipdit.data.cache import build_cache
from clipdit.experiment import AutoencoderExperiment, ClipExperiment, DecoderExperiment, PairSettings
from clipdit.images import write_image
from clipdit.model.autoencoder import load_vae
from clipdit.model.clip import load_clip
from clipdit.pipeline import ClipDiTPipeline, load_checkpoint
from clipdit.presets import paper
from clipdit.train.autoencoder import AutoencoderSettings, DecoderSettings
from clipdit.train.clip import ClipSettings
from clipdit.train.loop import TrainSettings
from clipdit.train.runs import run
from clipdit.train.state import STATE_FILE
from clipdit.train.translation import LossSettings

ONE_STEP = {"steps": 1, "save_every": 1, "warmup_steps": 0}


@pytest.fixture
def data(pairs_folder: Path, tmp_path: Path) -> Path:
    """The pairs, to change."""
    return Path(shutil.copytree(pairs_folder, tmp_path / "pairs"))


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def trained(tiny_experiment, pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after six steps."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    run(tiny_experiment(), "edges2emoji", pairs_folder, out)
    return out


def test_a_run_folder_holds_all_that_is_promised(trained: Path, tiny_experiment, history):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "model_index.json", "transformer", "vae", "image_encoder", "scheduler", "experiment.json", "README.md",
        STATE_FILE, "history.jsonl", "tensorboard", "loss_curve.png", "samples", "cache", ".lock",
    }  # fmt: skip
    experiment = json.loads((trained / "experiment.json").read_text())
    assert experiment["preset"] == "edges2emoji"
    assert experiment["model"]["width"] == 32
    assert experiment["objective"]["kind"] == "FlowMatching"
    assert experiment["data"]["pairs"] == 12
    assert [row["step"] for row in history(trained)] == [1, 2, 3, 4, 5, 6]
    for picture in ("loss_curve.png", "samples/step-000006.png"):
        with Image.open(trained / picture) as image:
            image.load()
            assert image.format == "PNG"
    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/reconstruction")] == [1, 2, 3, 4, 5, 6]
    assert (trained / "README.md").read_text().startswith("---\nlibrary_name: diffusers\n")
    usual = (trained / "experiment.json").stat().st_mode
    assert {path.stat().st_mode for path in trained.rglob("*.safetensors")} == {usual}  # others may read the weights, too


def test_a_run_folder_is_a_checkpoint_that_translates(trained: Path):
    source = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pipeline = load_checkpoint(trained)
    assert pipeline.sampling_defaults.steps == 2
    assert pipeline.native_size == (32, 32)
    images = pipeline(source, seeds=[0, 1])
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(ClipDiTPipeline.from_pretrained(str(trained))(source, seeds=[0, 1]), images)


def test_latents_are_standardised_by_the_pairs_own_statistics(trained: Path):
    config = load_checkpoint(trained).config
    (about,) = (trained / "cache").glob("*/about.json")
    statistics = json.loads(about.read_text())["statistics"]
    assert (list(config.latents_mean), list(config.latents_std)) == (statistics["mean"], statistics["std"])


@pytest.mark.parametrize("conditioning", ["concat", "clip", "both"])
def test_every_conditioning_trains_a_checkpoint_that_hears_what_it_should(
    conditioning, tiny_experiment, pairs_folder: Path, tmp_path: Path
):
    # what speaks for the source starts at zero: after two steps all of it has a voice
    experiment = tiny_experiment(train={"steps": 2, "lr": 0.01, "warmup_steps": 0, "ema_decay": 0.0}, drop_condition=0.0)
    experiment = replace(experiment, model=replace(experiment.model, conditioning=conditioning))
    run(experiment, "edges2emoji", pairs_folder, tmp_path / "run")
    pipeline = load_checkpoint(tmp_path / "run")
    assert (pipeline.image_encoder is None) == (conditioning == "concat")
    assert (tmp_path / "run" / "image_encoder").exists() == (conditioning != "concat")
    generator = torch.Generator().manual_seed(0)
    x, latent, tokens, pooled = (torch.randn(s, generator=generator) for s in ((1, 4, 8, 8), (1, 4, 8, 8), (1, 16, 24), (1, 16)))
    if conditioning == "concat":
        tokens, pooled = tokens[:, :0, :1], pooled[:, :1]
    condition = Condition(tokens=tokens, pooled=pooled, latent=latent)

    def hears(**changes) -> bool:
        with torch.no_grad():
            one = pipeline.transformer(x, torch.tensor([0.5]), condition)
            return not torch.equal(one, pipeline.transformer(x, torch.tensor([0.5]), replace(condition, **changes)))

    assert hears(latent=-latent) == (conditioning != "clip")
    if conditioning != "concat":
        assert hears(pooled=-pooled)
        assert hears(tokens=-tokens)


@pytest.mark.parametrize("network", ["st-lpips", "efficientnet-lite0"])
def test_the_papers_recipe_trains_with_its_losses_logged_apart(network, tiny_experiment, pairs_folder, history, tmp_path: Path):
    recipe = paper(tiny_experiment(train=ONE_STEP))
    recipe = replace(recipe, loss=replace(recipe.loss, gate=0.0, fraction=1.0, perceptual_network=network))
    run(recipe, "paper_edges2emoji", pairs_folder, tmp_path / "run")
    (row,) = history(tmp_path / "run")
    parts = {name: row[f"loss/{name}"] for name in ("reconstruction", "clip_similarity", "perceptual")}
    assert all(value > 0 for value in parts.values())
    total = parts["reconstruction"] + 0.1 * parts["clip_similarity"] + 0.1 * parts["perceptual"]
    assert row["loss/total"] == pytest.approx(total, rel=1e-5)
    pipeline = load_checkpoint(tmp_path / "run")
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    assert pipeline.transformer.config.conditioning == "clip"
    assert pipeline.sampling_defaults.steps == 50
    assert json.loads((tmp_path / "run" / "experiment.json").read_text())["objective"]["kind"] == "DDPM"


def test_memory_options_change_no_number(trained: Path, tiny_experiment, pairs_folder: Path, history, tmp_path: Path):
    frugal = tiny_experiment(train={"steps": 3, "gradient_checkpointing": True, "accumulate": 2, "schedule": "constant"})
    plain = tiny_experiment(train={"steps": 3, "schedule": "constant"})
    run(frugal, "edges2emoji", pairs_folder, tmp_path / "frugal")
    run(plain, "edges2emoji", pairs_folder, tmp_path / "plain")
    for one, other in zip(history(tmp_path / "plain"), history(tmp_path / "frugal"), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_bf16_trains_a_float32_checkpoint(tiny_experiment, pairs_folder: Path, history, tmp_path: Path):
    losses = []
    for precision in ("bf16", "fp32"):
        settings = {"steps": 2, "lr": 0.01, "warmup_steps": 0, "precision": precision}
        run(tiny_experiment(train=settings), "edges2emoji", pairs_folder, tmp_path / precision)
        losses.append(history(tmp_path / precision)[1]["loss/total"])  # of the first step it is that of an answer of zero
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert {p.dtype for p in load_checkpoint(tmp_path / "bf16").transformer.parameters()} == {torch.float32}


def test_a_vae_and_a_clip_are_trained_and_then_used_for_a_translation(tiny_experiment, data: Path, tmp_path: Path):
    lines = [{"id": str(i), "name": f"field {i}", "keywords": ["four colours"]} for i in range(12)]
    (data / "names.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = PairSettings(size=32, augment=Augment(views=1))
    train = TrainSettings(steps=2, batch_size=4, precision="fp32", save_every=1, log_every=1)
    settings = AutoencoderSettings(latent_channels=4, channels=(8, 8, 8), crop=16, perceptual=None)
    vae = AutoencoderExperiment(pairs=pairs, model=settings, train=train)
    clip = ClipExperiment(
        pairs=pairs,
        model=ClipSettings(image_size=32, patch_size=8, width=64, layers=1, text_width=64, text_layers=1, embedding=16),
        train=train,
    )
    run(vae, "emoji_vae", data, tmp_path / "vae")
    run(clip, "emoji_clip", data, tmp_path / "clip")
    assert load_vae(tmp_path / "vae").config["latent_channels"] == 4
    assert load_clip(tmp_path / "clip").config.projection_dim == 16
    for part in ("vae", "clip"):
        assert {"README.md", "experiment.json", "history.jsonl", "loss_curve.png", "samples"} <= set(os.listdir(tmp_path / part))
    experiment = tiny_experiment(train=ONE_STEP, vae=str(tmp_path / "vae"), clip=str(tmp_path / "clip"))
    run(experiment, "edges2emoji", data, tmp_path / "run")
    pipeline = load_checkpoint(tmp_path / "run")
    assert pipeline.transformer.config.clip_token_width == 64
    assert pipeline(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 3, 32, 32)


# ---- what is refused


def refuse(out: Path, experiment, data: Path, **options) -> str:
    with pytest.raises(ValueError) as caught:
        run(experiment, "edges2emoji", data, out, **options)
    return one_line(caught)


def test_a_folder_that_is_not_empty_is_refused_and_not_touched(trained: Path, tiny_experiment, pairs_folder, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    line = refuse(tmp_path / "full", tiny_experiment(), pairs_folder)
    assert line == f"{tmp_path / 'full'} is there already; give a new or empty folder"
    assert os.listdir(tmp_path / "full") == ["diary.txt"]
    line = refuse(trained, tiny_experiment(), pairs_folder)
    assert line == f"{trained} is there already; add --resume to go on, or give another folder"
    (tmp_path / "file").write_text("")
    assert refuse(tmp_path / "file", tiny_experiment(), pairs_folder).endswith("is a file; give a new or empty folder")


def test_what_a_start_that_was_killed_left_does_not_count(tiny_experiment, pairs_folder: Path, tmp_path: Path):
    out = tmp_path / "run"
    (out / "cache").mkdir(parents=True)
    (out / ".contents.part").mkdir()
    (out / ".0123456789abcdef.part").write_text("half a state")
    (out / ".lock").touch()
    run(tiny_experiment(train=ONE_STEP), "edges2emoji", pairs_folder, out)
    assert not list(out.rglob("*.part"))


def test_resuming_nothing_is_refused(tiny_experiment, pairs_folder: Path, tmp_path: Path):
    line = refuse(tmp_path / "run", tiny_experiment(), pairs_folder, resume=True)
    assert line.endswith(f"holds no {STATE_FILE}, so there is nothing to resume; leave out --resume to start")
    assert not (tmp_path / "run").exists()


def test_resuming_a_damaged_state_is_refused(trained: Path, tiny_experiment, pairs_folder: Path, tmp_path: Path):
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    (out / STATE_FILE).write_bytes((out / STATE_FILE).read_bytes()[:-100])
    assert "is damaged" in refuse(out, tiny_experiment(), pairs_folder, resume=True)


def test_resuming_with_another_setting_is_refused_by_name_before_anything_is_read(trained: Path, tiny_experiment, tmp_path):
    nowhere = tmp_path / "no data here"

    def resumed(**changes) -> str:
        return refuse(trained, tiny_experiment(**changes), nowhere, resume=True)

    assert resumed(train={"lr": 0.5}).startswith("the run began with train.lr = 0.0005, now it is 0.5; resume with")
    assert resumed(model={"depth": 3}).startswith("the run began with model.depth = 2, now it is 3")
    assert resumed(guidance=2.0).startswith("the run began with guidance = 1.0, now it is 2.0")
    assert resumed(loss=LossSettings(perceptual=0.1)).startswith("the run began with loss.perceptual = 0.0, now it is 0.1")
    assert resumed().startswith(f"{nowhere} does not exist")


def test_resuming_with_other_pairs_is_refused(trained: Path, tiny_experiment, data: Path, tmp_path: Path):
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    (data / "train" / "3.png").unlink()
    line = refuse(out, tiny_experiment(train={"steps": 9}), data, resume=True)
    assert line.startswith("the run began with data.pairs = 12, now it is 11")
    shutil.copy(data / "train" / "4.png", data / "train" / "new.png")
    line = refuse(out, tiny_experiment(train={"steps": 9}), data, resume=True)
    assert line.startswith("the run began with data.pairs_sha256 = ")


def test_a_moved_data_folder_can_be_resumed_and_a_run_prolonged(trained: Path, tiny_experiment, data: Path, history, tmp_path):
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    progress = run(tiny_experiment(train={"steps": 8}), "edges2emoji", data, out, resume=True)
    assert progress.step == 8
    assert len(history(out)) == 8
    assert "step 8 of 8" in (out / "README.md").read_text()


def test_broken_pairs_are_left_out_by_name(tiny_experiment, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (data / "train" / "5.png").write_bytes((data / "train" / "5.png").read_bytes()[:60])
    with caplog.at_level(logging.WARNING, logger="clipdit"):
        run(tiny_experiment(train=ONE_STEP), "edges2emoji", data, tmp_path / "run")
    assert any("5.png" in record.getMessage() for record in caplog.records)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| left out | 1 that could not be used |" in card
    assert "11 train" in card


def test_a_folder_without_pairs_to_train_on_is_refused(tiny_experiment, data: Path, tmp_path: Path):
    shutil.rmtree(data / "train")
    line = refuse(tmp_path / "run", tiny_experiment(), data)
    assert line == f"{data} holds no pairs to train on; `clipdit data check {data}` says what was found"
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "run", tiny_experiment(), tmp_path / "empty")
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_together_is_refused_before_the_cache_is_made(tiny_experiment, pairs_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("clipdit.train.runs.build_cache", lambda *a, **k: pytest.fail("caching takes minutes"))
    wrong_size = replace(tiny_experiment(), pairs=PairSettings(size=36))
    assert refuse(tmp_path / "run", wrong_size, pairs_folder) == (
        "pairs.size is 36; wanted a multiple of 8 (4 pixels a cell, patch 2)"
    )
    nowhere = str(tmp_path / "nowhere")
    assert nowhere in refuse(tmp_path / "run", tiny_experiment(vae=nowhere), pairs_folder)
    assert nowhere in refuse(tmp_path / "run", tiny_experiment(clip=nowhere), pairs_folder)
    lpips = tiny_experiment(loss=LossSettings(perceptual=1.0, perceptual_network="lpips"))
    monkeypatch.setattr("torch.hub.get_dir", lambda: nowhere)
    assert "needs its trunk weights" in refuse(tmp_path / "run", lpips, pairs_folder)


def test_a_run_can_begin_with_the_weights_of_another(trained: Path, tiny_experiment, pairs_folder: Path, tmp_path: Path):
    still = {"steps": 1, "lr": 1e-12, "warmup_steps": 0}
    run(tiny_experiment(train=still, init=str(trained)), "edges2emoji", pairs_folder, tmp_path / "run")
    run(tiny_experiment(train=still), "edges2emoji", pairs_folder, tmp_path / "fresh")
    old, new, fresh = (load_checkpoint(at).transformer.state_dict() for at in (trained, tmp_path / "run", tmp_path / "fresh"))
    for name, weight in old.items():
        torch.testing.assert_close(new[name], weight, rtol=0, atol=1e-9)
    assert any(not torch.allclose(fresh[name], weight) for name, weight in old.items())
    assert json.loads((tmp_path / "run" / "experiment.json").read_text())["init"] == str(trained)


def test_beginning_with_weights_that_learnt_something_else_is_refused(trained: Path, tiny_experiment, pairs_folder, tmp_path):
    wider = tiny_experiment(model={"width": 64}, init=str(trained))
    assert refuse(tmp_path / "run", wider, pairs_folder) == (
        f"the DiT of --init {trained} has width 32, this run 64; they must be the same"
    )
    pipeline = load_checkpoint(trained)
    other = shutil.copytree(trained, tmp_path / "clip")
    with torch.no_grad():
        next(pipeline.image_encoder.parameters()).mul_(1.5)
    pipeline.image_encoder.save_pretrained(other / "image_encoder")
    assert refuse(tmp_path / "run", tiny_experiment(init=str(other)), pairs_folder) == (
        f"the DiT of --init {other} was trained with another CLIP; give --clip {other}, too"
    )
    other = shutil.copytree(trained, tmp_path / "vae")
    with torch.no_grad():
        for weight in pipeline.vae.encoder.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(1), std=0.2)
    pipeline.vae.save_pretrained(other / "vae")
    reason = refuse(tmp_path / "run", tiny_experiment(init=str(other)), pairs_folder)
    assert re.fullmatch(
        rf"the DiT of --init {other} was trained with another VAE; its latents and --vae's correlate by -?0\.\d\d, "
        rf"wanted 0\.8 or more\. Give --vae {other}, too, or leave --init out", reason,
    )  # fmt: skip
    assert "model_index.json" in refuse(tmp_path / "run", tiny_experiment(init=str(tmp_path / "vae" / "vae")), pairs_folder)


def test_a_dit_is_trained_on_for_a_vae_that_was_fine_tuned_from_its_own(
    tiny_experiment, pairs_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    old, new = tmp_path / "old", tmp_path / "new"
    model = AutoencoderSettings(crop=16, perceptual=None, latent_channels=4, channels=(8, 8, 8))
    torch.manual_seed(0)
    model.make().save_pretrained(old / "vae")
    run(tiny_experiment(train=ONE_STEP, vae=str(old)), "edges2emoji", pairs_folder, tmp_path / "first")
    train = TrainSettings(steps=2, batch_size=4, precision="fp32", save_every=1, log_every=1, lr=1e-3, warmup_steps=0)
    tuned = AutoencoderExperiment(pairs=PairSettings(size=32), model=model, train=train, init=str(old))
    run(tuned, "emoji_vae", pairs_folder, new)
    assert not torch.equal(*(next(load_vae(vae).encoder.parameters()) for vae in (old, new)))
    again = tiny_experiment(train=ONE_STEP, vae=str(new), init=str(tmp_path / "first"))
    with caplog.at_level(logging.INFO, logger="clipdit.train.runs"):
        run(again, "edges2emoji", pairs_folder, tmp_path / "second")
    assert re.search(r"another VAE; its latents .* correlate by (0\.[89]\d|1\.00): near enough", caplog.text)


def test_a_fine_tuned_decoder_fits_the_checkpoint_that_it_came_from(trained: Path, tiny_experiment, data: Path, tmp_path: Path):
    settings = DecoderSettings(crop=16, perceptual=None)
    train = TrainSettings(steps=2, batch_size=4, precision="fp32", save_every=1, log_every=1, lr=1e-2)
    decoder = DecoderExperiment(vae=str(trained), pairs=PairSettings(size=32), model=settings, train=train)
    run(decoder, "vae_decoder", data, tmp_path / "decoder")
    assert "cp decoder/vae/* CHECKPOINT/vae/" in (tmp_path / "decoder" / "README.md").read_text()
    better = shutil.copytree(trained, tmp_path / "better")
    shutil.copytree(tmp_path / "decoder" / "vae", better / "vae", dirs_exist_ok=True)
    source = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    old, new = load_checkpoint(trained), load_checkpoint(better)
    assert not torch.equal(old(source), new(source))
    assert torch.equal(old.autoencoder.encode(torch.zeros(1, 3, 32, 32)), new.autoencoder.encode(torch.zeros(1, 3, 32, 32)))
    run(tiny_experiment(train=ONE_STEP, init=str(trained), vae=str(better)), "edges2emoji", data, tmp_path / "run")


def test_two_runs_share_a_cache(tiny_experiment, pairs_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    experiment = tiny_experiment(train=ONE_STEP)
    experiment = replace(experiment, pairs=replace(experiment.pairs, cache=tmp_path / "shared"))
    with caplog.at_level(logging.INFO, logger="clipdit"):
        for name in ("one", "two"):
            run(experiment, "edges2emoji", pairs_folder, tmp_path / name)
    made = [r.getMessage() for r in caplog.records if "cache" in r.getMessage()]
    assert len(made) == 2 and made[0].startswith("cached 12 pairs x 2 views") and made[1].startswith("using the cache")
    assert not (tmp_path / "one" / "cache").exists()
    assert len(list((tmp_path / "shared").glob("*/about.json"))) == 1


def test_train_and_held_out_pairs_stay_apart(tiny_experiment, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cached: list[str] = []

    def build(folder, pairs, *more, **options):
        cached.extend(pair.id for pair in pairs)
        return build_cache(folder, pairs, *more, **options)

    monkeypatch.setattr("clipdit.train.runs.build_cache", build)
    white = torch.full((3, 32, 64), 255, dtype=torch.uint8)
    write_image(data / "val" / "white.png", white)
    run(tiny_experiment(train=ONE_STEP), "edges2emoji", data, tmp_path / "run")
    assert sorted(cached) == sorted(f"train/{i}" for i in range(12))
