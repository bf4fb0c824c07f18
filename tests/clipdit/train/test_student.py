"""Students: what the teacher tells them, and that they learn to do in one step what it does in many."""

from pathlib import Path

import pytest
import torch

from clipdit.backend import Condition
from clipdit.cli import main
from clipdit.consistency import Consistency
from clipdit.diffusion import DDPM
from clipdit.model.network import Network
from clipdit.pipeline import load_checkpoint
from clipdit.testing import tiny_checkpoint, tiny_pipeline
from clipdit.train.student import Teacher
from clipdit.translator import Translator


class Field(Network):
    """Velocity: the source, less and less, and a tenth of x."""

    def forward(self, x, t, condition):
        return condition.latent * (1 - t.reshape(-1, 1, 1, 1)) + 0.1 * x


def condition(count: int = 3) -> Condition:
    latent = torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return Condition(tokens=latent.new_zeros(count, 0, 1), pooled=latent.new_zeros(count, 1), latent=latent)


def test_the_target_is_where_the_student_ends_after_one_guided_step_of_the_teacher():
    teacher, student, given = Teacher(Field(), guidance=2.0, intervals=4), Field(), condition()
    x, t = torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.25, 0.75])
    chord = teacher.chord(student, x, t, given)
    for i in range(3):
        now, then = float(t[i]), float(t[i]) + 0.25
        blank = 0.1 * x[i]
        velocity = blank + 2 * (given.latent[i] * (1 - now))
        reached = x[i] + 0.25 * velocity
        end = reached + (1 - then) * (given.latent[i] * (1 - then) + 0.1 * reached)
        torch.testing.assert_close(chord[i], (end - x[i]) / (1 - now))
    # at the last interval there is nothing to ask the student for
    torch.testing.assert_close(chord[2], 0.1 * x[2] + 2 * given.latent[2] * 0.25)


def test_a_teacher_learns_nothing():
    pipeline = tiny_pipeline()
    teacher = Teacher(pipeline.transformer, guidance=1.0, intervals=4)
    teacher.train()
    assert not teacher.dit.training and not any(p.requires_grad for p in teacher.parameters())


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
    more = ("--train.steps", 120, "--train.lr", 2e-3, "--train.ema-decay", 0.9, "--objective.intervals", 8)
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
    two = student(sources, seeds=seeds, steps=2)
    again = student(sources.flip(0), seeds=seeds[::-1], steps=2).flip(0)
    assert (two.int() - again.int()).abs().max() <= 1, "the noise between steps is of the seed, too"


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
    assert isinstance(ours.objective, Consistency) and ours.sampling_defaults.steps == 2
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
