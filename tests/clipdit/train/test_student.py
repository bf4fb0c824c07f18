"""Students: where their teacher ends, and that they learn to go there in one step."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clipdit.backend import Condition
from clipdit.cli import main
from clipdit.data.cache import LatentCache
from clipdit.diffusion import DDPM
from clipdit.flow import FlowMatching
from clipdit.model.network import Network
from clipdit.pipeline import load_checkpoint
from clipdit.sampling import SamplingTable, flow_table, guide, sample
from clipdit.testing import tiny_checkpoint, tiny_pipeline
from clipdit.torch_backend import EagerBackend
from clipdit.train.order import step_generator
from clipdit.train.student import Ends, EndsSettings
from clipdit.translator import Translator


class Counting:
    """A teacher that says what the one it wraps says, and how often it was asked for an end."""

    def __init__(self, backend: EagerBackend):
        self.backend, self.asked = backend, 0

    def sample(self, noise, condition: Condition, table: SamplingTable, *, guidance: float = 1.0):
        self.asked += len(noise)
        return self.backend.sample(noise, condition, table, guidance=guidance)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, pairs_folder) -> LatentCache:
    """Of the pairs as a tiny model sees them."""
    from clipdit.data.augment import Augment
    from clipdit.data.cache import build_cache
    from clipdit.data.pairs import find_pairs

    pipeline, folder = tiny_pipeline(), tmp_path_factory.mktemp("cache")
    augment = Augment(views=2)
    return build_cache(folder, find_pairs(pairs_folder).pairs, bare(pipeline), pipeline.clip, augment, size=(32, 32))


def bare(pipeline):
    from clipdit.model.autoencoder import Autoencoder

    return Autoencoder(pipeline.vae)


def ends_of(cache: LatentCache, folder: Path, *, seed: int = 0, guidance: float = 2.0, **settings: int) -> tuple[Ends, Counting]:
    pipeline = tiny_pipeline()
    teacher = Counting(EagerBackend(pipeline))
    asked = replace(EndsSettings(reuse=2, ahead=2, keep=16), **settings)
    made = Ends(
        teacher, pipeline.transformer, flow_table(3), guidance=guidance,
        cache=cache, folder=folder, batch=4, seed=seed, settings=asked,
    )  # fmt: skip
    return made, teacher


def drawn(ends: Ends, step: int):
    return ends.draw(step, step_generator(0, step))


def test_an_end_is_where_the_guided_teacher_comes_from_that_noise_and_source(cache, tmp_path):
    ends, _ = ends_of(cache, tmp_path)
    rows, noise, end = drawn(ends, 0)
    dit: Network = tiny_pipeline().transformer
    about = cache.rows(rows)
    condition = Condition(tokens=about["tokens"], pooled=about["pooled"], latent=about["source"])
    with torch.no_grad():
        wanted = sample(guide(dit, condition, 2.0), noise, flow_table(3))
    torch.testing.assert_close(end, wanted, rtol=1e-4, atol=1e-5)
    assert 0.9 < noise.std() < 1.1 and len(rows) == 4 and rows.max() < cache.pairs * cache.views


def test_ends_are_found_ahead_then_a_batch_in_so_many_steps(cache, tmp_path):
    ends, teacher = ends_of(cache, tmp_path)
    asked = []
    for step in range(6):
        drawn(ends, step)
        asked.append(teacher.asked)
    assert asked == [8, 8, 12, 12, 16, 16]


def test_the_latest_are_learnt_from_and_older_ones_leave_the_disk(cache, tmp_path):
    ends, _ = ends_of(cache, tmp_path, keep=8)
    early = {float(x[0, 0, 0]) for x in drawn(ends, 0).noise}
    late = {float(x[0, 0, 0]) for step in range(1, 20) for x in drawn(ends, step).noise if step >= 8}
    assert not early & late
    assert len(list(ends.folder.glob("block-*"))) == 2


def test_a_resumed_run_draws_what_the_unbroken_one_did_and_asks_nothing_twice(cache, tmp_path):
    unbroken, _ = ends_of(cache, tmp_path / "a")
    wanted = [drawn(unbroken, step) for step in range(8)]
    before, _ = ends_of(cache, tmp_path / "b")
    for step in range(5):
        drawn(before, step)
    resumed, teacher = ends_of(cache, tmp_path / "b")
    for step in range(5, 8):
        for now, then in zip(drawn(resumed, step), wanted[step], strict=True):
            assert np.array_equal(now, then)
    assert teacher.asked == 4, "the block of step 6 alone"


def test_a_block_that_was_half_written_is_found_again(cache, tmp_path):
    ends, _ = ends_of(cache, tmp_path)
    wanted = drawn(ends, 0).end
    file = sorted(ends.folder.glob("block-*"))[0]
    file.write_bytes(file.read_bytes()[:-9])
    again, teacher = ends_of(cache, tmp_path)
    assert torch.equal(drawn(again, 0).end, wanted) and teacher.asked == 4


@pytest.mark.parametrize("other", [{"seed": 1}, {"guidance": 1.0}])
def test_ends_of_another_seed_or_guidance_are_not_taken(other, cache, tmp_path):
    first, _ = ends_of(cache, tmp_path)
    drawn(first, 0)
    second, teacher = ends_of(cache, tmp_path, **other)
    drawn(second, 0)
    assert teacher.asked == 8


@pytest.mark.parametrize("name", ["reuse", "ahead", "keep", "steps"])
def test_settings_below_one_are_refused(name):
    with pytest.raises(ValueError, match=rf"ends\.{name} is 0; wanted at least 1"):
        EndsSettings(**{name: 0})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, pairs_folder) -> Path:
    """A tiny checkpoint that has learnt a little."""
    from clipdit.pipeline import save_checkpoint

    folder = tmp_path_factory.mktemp("teacher") / "run"
    pipeline = tiny_pipeline(conditioning="both")
    pipeline.register_to_config(default_guidance=1.5)
    save_checkpoint(pipeline, folder)
    return folder


def words(teacher: Path, pairs: Path, out: Path, *more: object) -> list[str]:
    given = [
        "train",
        "student",
        "--data",
        pairs,
        "--out",
        out,
        "--teacher",
        teacher,
        "--pairs.size",
        32,
        "--train.precision",
        "fp32",
    ]
    given += ["--loss.perceptual", 0, "--train.batch-size", 8, "--train.warmup-steps", 0, "--pairs.augment.views", 1]
    return [str(word) for word in (*given, *more)]


def test_a_student_comes_nearer_to_its_teacher_in_one_step(teacher, pairs_folder, tmp_path):
    out = tmp_path / "student"
    more = ("--train.steps", 120, "--train.lr", 2e-3, "--train.ema-decay", 0.9, "--ends.steps", 8, "--ends.reuse", 4)
    assert main(words(teacher, pairs_folder, out, *more)) == 0
    sources = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    taught, student = Translator.open(teacher, device="cpu"), Translator.open(out, device="cpu")
    assert (student.defaults.steps, student.defaults.guidance, student.defaults.solver) == (1, 1.0, None)
    seeds = list(range(6))
    wanted = taught(sources, seeds=seeds, steps=8, guidance=1.5).float()
    at_first = taught(sources, seeds=seeds, steps=1, guidance=1.0).float()
    now = student(sources, seeds=seeds).float()
    assert (now - wanted).square().mean() < 0.5 * (at_first - wanted).square().mean()
    with pytest.raises(ValueError, match="trained without"):
        student(sources, seeds=seeds, guidance=1.5)
    two = (student(sources, seeds=seeds, steps=2).float() - wanted).square().mean()
    assert two < 0.5 * (at_first - wanted).square().mean(), "two steps go on along the same line"
    assert not list((out / "ends").glob("*/.*")), "nothing half-written is left"


def test_it_keeps_its_teachers_parts_and_statistics(teacher, pairs_folder, tmp_path):
    out = tmp_path / "student"
    assert main(words(teacher, pairs_folder, out, "--train.steps", 1, "--steps", 2, "--loss.clip-similarity", 0.1)) == 0
    ours, theirs = load_checkpoint(out), load_checkpoint(teacher)
    assert (
        ours.config["latents_mean"] == theirs.config["latents_mean"]
        and ours.config["latents_std"] == theirs.config["latents_std"]
    )
    for part in ("vae", "image_encoder"):
        a, b = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert isinstance(ours.objective, FlowMatching) and ours.sampling_defaults.steps == 2
    assert (out / "samples" / "step-000001.png").exists()


REFUSED = {
    "noise": "is of DDPM; a student learns from",
    "size": "pairs.size is 64; wanted the size of --teacher",
    "no CLIP": "loss.clip_similarity and loss.alignment need a CLIP, and this model has none; leave them out",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_teacher_that_cannot_teach_is_refused(kind, teacher, pairs_folder, tmp_path, capsys):
    given, more = teacher, ()
    if kind == "noise":
        given = tiny_checkpoint(tmp_path / "ddpm", objective=DDPM())
    elif kind == "size":
        more = ("--pairs.size", 64)
    else:
        given, more = tiny_checkpoint(tmp_path / "concat", conditioning="concat"), ("--loss.alignment", 0.5)
    assert main([*words(given, pairs_folder, tmp_path / "out"), *map(str, more)]) == 2
    assert REFUSED[kind] in capsys.readouterr().err
    assert not (tmp_path / "out" / "model_index.json").exists() and not list((tmp_path / "out").glob("cache/*"))
