"""The comparison: equal terms for all, from pairs to tables and figures, and on from where it was stopped."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from clipdit.cli import main
from clipdit.diffusion import DDPM
from clipdit.experiment import AdversarialExperiment, StudentExperiment, TranslationExperiment
from clipdit.images import read_image, write_image
from clipdit.presets import edges2emoji, pix2pix
from clipdit.results import comparison
from clipdit.results.comparison import Plan, Variant, compare, evaluation_file, evaluations, experiment_of, run_folder, variants
from clipdit.results.figures import draw_all
from clipdit.results.methods import MAIN, METHODS, Method
from clipdit.results.tables import markdown, results
from clipdit.train.adversarial import AdversarySettings, UNetSettings


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """12 pairs to train on and 4 to test by, side by side, 32 x 32 each."""
    folder = tmp_path_factory.mktemp("comparison") / "fields"
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("test", 4)):
        for i in range(count):
            source = (torch.rand(3, 2, 2, generator=generator) * 255).to(torch.uint8)
            both = torch.cat((source, source.flip(-1)), dim=-1).repeat_interleave(16, 1).repeat_interleave(16, 2)
            write_image(folder / split / f"{i}.png", both)
    return folder


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.2)


def small_gan(base: TranslationExperiment) -> AdversarialExperiment:
    train = replace(base.train, lr=2e-4, betas=(0.5, 0.999), clip_norm=1e9)
    return AdversarialExperiment(
        pairs=base.pairs, model=UNetSettings(width=2, levels=4), loss=AdversarySettings(width=2), train=train
    )


@pytest.fixture
def small(monkeypatch):
    """The baselines at a size that trains in seconds."""
    monkeypatch.setitem(METHODS, "pix2pix", replace(METHODS["pix2pix"], make=small_gan))
    monkeypatch.setattr(comparison, "student", lambda: StudentExperiment(loss=replace(StudentExperiment().loss, perceptual=0.0)))


def plan_of(base: TranslationExperiment, data: Path, *methods: str, **changes) -> Plan:
    return Plan(
        **{"data": data, "base": base, "preset": "edges2emoji", "methods": methods, "minutes": 0.05, "best_of": 2, **changes}
    )


def test_a_method_differs_from_ours_in_its_method_alone(tmp_path):
    base, plan = edges2emoji(), plan_of(edges2emoji(), tmp_path, *METHODS, seeds=(3,))
    for name in METHODS:
        made, _ = experiment_of(plan, name, 3, tmp_path)
        assert replace(made.pairs, cache=None) == base.pairs and made.train.seed == 3, name
        if isinstance(made, TranslationExperiment):
            assert (made.vae, made.clip, made.drop_condition) == (base.vae, base.clip, base.drop_condition)
            assert replace(made.train, seed=0) == base.train, name
    hd, _ = experiment_of(plan, "pix2pixhd", 3, tmp_path)
    assert isinstance(hd, AdversarialExperiment) and (hd.train.lr, hd.train.betas, hd.train.batch_size) == (2e-4, (0.5, 0.999), 1)
    taught, preset = experiment_of(plan, "student", 3, tmp_path)
    assert isinstance(taught, StudentExperiment) and preset == "student"
    assert taught.teacher == str(run_folder(tmp_path, "ours", 3))
    assert isinstance(experiment_of(plan, "ddpm", 3, tmp_path)[0].objective, DDPM)
    ours, *ablations = (experiment_of(plan, n, 3, tmp_path)[0] for n, m in METHODS.items() if m.role in ("ours", "ablation"))
    assert all(made != ours for made in ablations)


def test_the_baselines_are_the_published_ones():
    made = METHODS["pix2pix"].make(edges2emoji())
    assert made.model == pix2pix().model and made.loss == pix2pix().loss
    assert set(MAIN) == {"pix2pix", "pix2pixhd", "paper", "ours", "student"}


def test_from_pairs_to_tables_and_figures_and_nothing_twice(small, tiny_experiment, pairs, tmp_path, monkeypatch):
    out = tmp_path / "results"
    plan = plan_of(tiny_experiment(train={"steps": 4}), pairs, "pix2pix", "ours", "student")
    assert compare(plan, out) == {}
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert compare(plan, out) == {}
    again = {path: path.stat().st_mtime_ns for path in written}
    assert {path.name for path in written if written[path] != again[path]} <= {"plan.json"}

    plain = results(plan, out, {})
    json.dumps(plain, allow_nan=False)
    names = [row["name"] for row in plain["rows"]]
    assert names[:2] == ["pix2pix", "ours"] and names[-3:] == ["copy_source", "mean_target", "real"]
    assert {"ours-1-steps", "student", "student-2-steps"} <= set(names)
    by_name = {row["name"]: row for row in plain["rows"]}
    report = json.loads(evaluation_file(out, Variant(method="ours"), 0).read_text())
    assert by_name["ours"]["values"]["PSNR"] == [report["rows"]["model"]["distance_to_target"]["psnr_db"]["mean"]]
    assert report["model"]["steps"] == 2 and report["protocol"]["samples_per_source"] == 2
    (trained,), cost = by_name["ours"]["training"], by_name["ours"]["cost"]
    assert (trained["steps"], trained["images"]) == (4, 4 * plan.base.train.batch_size) and 0 < trained["minutes"] <= plan.minutes
    assert cost["ms_per_image"]["median"] > 0 and cost["parameters"] == by_name["student"]["cost"]["parameters"]
    assert cost["gflop_per_image"] > by_name["ours-1-steps"]["cost"]["gflop_per_image"] > 0, "fewer steps are fewer operations"
    text = markdown(plain)
    assert "- **ours**: flow" in text and "- **student, 1 step**: reflow" in text and "- **ours, 1 step**" not in text
    assert "| Pix2Pix | 4 |" in text and "one seed, so without an interval" in text and "**" in text

    figures = draw_all(plan, out)
    assert {path.name for path in figures} == {"architecture-ours.png", "loss-curves.png", "unseen-pairs.png", "failures.png"}
    sheet = read_image(out / "unseen-pairs.png")
    assert sheet.shape[2] > 5 * 160, "source, three methods, target"
    # another method comes to what is there
    more = replace(plan, methods=(*plan.methods, "concat"))
    (out / "cost.json").write_text("{}")  # as of networks that had these places before
    assert compare(more, out) == {} and run_folder(out, "concat", 0).exists()
    assert "concat" in json.loads((out / "cost.json").read_text())["cost"]
    with pytest.raises(ValueError, match="another setting of minutes"):
        compare(replace(plan, minutes=1.0), out)
    with pytest.raises(ValueError, match="another setting of base"):
        compare(replace(plan, base=replace(plan.base, steps=3)), out)
    # a comparison of before a setting was there goes on
    file = out / "plan.json"
    began = json.loads(file.read_text())
    del began["plan"]["base"]["loss"]["alignment"]
    file.write_text(json.dumps(began))
    assert compare(more, out) == {}
    # what a method was before it changed is not taken for what it is now
    monkeypatch.setitem(
        METHODS,
        "pix2pix",
        replace(METHODS["pix2pix"], make=lambda base: replace(small_gan(base), loss=AdversarySettings(width=3))),
    )
    with pytest.raises(ValueError, match=r"seed-0 is of another pix2pix: the run began with loss.width = 2, now it is 3"):
        compare(plan, out)


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes as Linux shows them")
def test_a_training_whose_comparison_is_killed_saves_and_ends(pairs, tmp_path):
    words = ["--data", str(pairs), "--out", str(tmp_path / "out"), "--minutes", "9", "--methods", "pix2pix", "--size", "32"]
    command = [Path(sys.executable).with_name("clipdit"), "results"]
    run, log = tmp_path / "out" / "runs" / "pix2pix" / "seed-0", tmp_path / "log"
    with log.open("w") as said, subprocess.Popen([*command, *words], stderr=said) as started:
        try:
            wait_until(lambda: (run / "samples").exists() or (run / "history.jsonl").exists(), 120)
            children = psutil.Process(started.pid).children(recursive=True)
            assert children
        finally:
            started.kill()
    _, left = psutil.wait_procs(children, timeout=60)
    assert left == []
    assert (run / "training_state.safetensors").exists()
    assert "Traceback" not in log.read_text(), log.read_text()


IN_THE_BACKGROUND = """
import signal, time
from clipdit.results.comparison import _in_a_process
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what a script puts into the background
_in_a_process(time.sleep, 300)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes as Linux shows them")
def test_what_is_not_a_training_yet_ends_with_its_comparison_in_the_background_too():
    def sleeping(child: psutil.Process) -> bool:
        return child.children() == [] and child.num_threads() > 1

    with subprocess.Popen([sys.executable, "-c", IN_THE_BACKGROUND]) as started:
        try:
            family = psutil.Process(started.pid)
            wait_until(lambda: any(sleeping(c) for child in family.children() for c in child.children()), 120)
            children = family.children(recursive=True)
        finally:
            started.kill()
    _, left = psutil.wait_procs(children, timeout=30)
    assert left == []


def test_what_fails_is_said_and_the_others_go_on(small, tiny_experiment, pairs, tmp_path, monkeypatch):
    def broken(base: TranslationExperiment) -> TranslationExperiment:
        return replace(base, vae=str(tmp_path / "no-vae-here"))

    monkeypatch.setitem(METHODS, "concat", replace(METHODS["concat"], make=broken))
    plan = plan_of(tiny_experiment(train={"steps": 2}), pairs, "concat", "pix2pix")
    failed = compare(plan, tmp_path / "results")
    assert list(failed) == ["concat, seed 0"] and "no-vae-here" in failed["concat, seed 0"]
    assert [variant.name for variant, _ in evaluations(plan, tmp_path / "results")] == ["pix2pix"]
    assert "Not done: concat, seed 0: " in markdown(results(plan, tmp_path / "results", failed))


def test_ablations_are_of_the_first_seeds_alone(tmp_path, monkeypatch):
    done: list[tuple[str, int]] = []
    monkeypatch.setattr(comparison, "_train", lambda plan, name, seed, out: done.append((name, seed)))
    monkeypatch.setattr(comparison, "_evaluate", lambda *_: None)
    monkeypatch.setattr(comparison, "_measure_cost", lambda *_: None)
    plan = plan_of(edges2emoji(), tmp_path, "ours", "concat", seeds=(5, 6, 7))
    assert compare(plan, tmp_path / "one") == {}
    assert done == [("ours", 5), ("concat", 5), ("ours", 6), ("ours", 7)]
    done.clear()
    assert compare(replace(plan, ablation_seeds=2), tmp_path / "one") == {}, "more seeds come to what is there"
    assert done == [("ours", 5), ("concat", 5), ("ours", 6), ("concat", 6), ("ours", 7)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("no-such",)}, "no-such: no method"),
        ({"methods": ()}, "no method"),
        ({"methods": ("student",)}, "learns from ours"),
        ({"seeds": (1, 1)}, "seeds are"),
        ({"minutes": 0.0}, "minutes is 0"),
        ({"seeds": (0, 1), "ablation_seeds": 3}, "ablation_seeds is 3; wanted 1 to the number of seeds, 2"),
    ],
)
def test_plans_that_cannot_be(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan_of(edges2emoji(), tmp_path, **{"methods": ("ours",), **changes})


def test_the_command_says_what_is_wrong_before_it_works(pairs, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    assert main(["results", "--data", str(pairs), "--out", str(tmp_path / "full"), "--methods", "ours"]) == 2
    assert "holds no plan.json" in capsys.readouterr().err
    assert main(["results", "--data", str(pairs), "--out", str(tmp_path / "x"), "--methods", "nonsense"]) == 2
    assert "nonsense: no method of the comparison; there are pix2pix" in capsys.readouterr().err


def test_variants_are_a_method_with_its_own_steps_and_others():
    plan = plan_of(edges2emoji(), Path("x"), "ours", "student")
    assert [v.name for v in variants(plan)] == [
        "ours", "ours-1-steps", "ours-2-steps", "ours-4-steps", "student", "student-2-steps", "student-4-steps",
    ]  # fmt: skip
    assert [v.label for v in variants(plan)][:2] == ["ours", "ours, 1 step"]
    mixed = variants(plan_of(edges2emoji(), Path("x"), "ours", "paper", "pix2pixhd", "pix2pix"))
    assert list(dict.fromkeys(v.method for v in mixed)) == ["pix2pix", "pix2pixhd", "paper", "ours"]
    assert all(isinstance(method, Method) for method in METHODS.values())
