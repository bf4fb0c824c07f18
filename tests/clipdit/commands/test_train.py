"""`clipdit train`: help that lists everything, settings that reach the run, and mistakes answered in one line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clipdit import cli
from clipdit.images import write_image
from clipdit.presets import PRESETS
from clipdit.train.state import Progress


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What would have been trained."""
    made = []

    def run(experiment, preset, data, out, *, resume, minutes):
        made.append({"experiment": experiment, "preset": preset, "data": data, "out": out, "resume": resume, "minutes": minutes})
        return Progress(step=7, seconds=12.34)

    monkeypatch.setattr("clipdit.train.runs.run", run)
    return made


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must be refused with exit code 2 and one line, which it returns."""

    def check(*words: object) -> str:
        assert cli.main(["train", *map(str, words)]) == cli.WRONG_INPUT
        output = capsys.readouterr()
        assert output.out == ""
        lines = output.err.splitlines()
        assert len(lines) == 1, output.err
        return lines[0].removeprefix("clipdit: ")

    return check


HERE = ("--data", "pairs", "--out", "run")


def test_help_lists_the_presets_with_a_line_each(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", "--help"]) == cli.DONE
    text = capsys.readouterr().out
    assert text.startswith("usage: clipdit train PRESET --data DIR --out RUN")
    for name, preset in PRESETS.items():
        assert f"  {name} " in text
        assert (preset.__doc__ or "").strip().splitlines()[0] in text


@pytest.mark.parametrize("name", ["edges2emoji", "paper_edges2emoji", "emoji_vae", "vae_decoder", "emoji_clip"])
def test_help_of_a_preset_lists_every_setting_with_its_default(name: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", name, "--help"]) == cli.DONE
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"usage: clipdit train {name}" in text
    wanted = ["--data PATH", "--out PATH", "--minutes", "--resume", "--json", "--train.lr FLOAT", "--pairs.size INT"]
    own = {
        "emoji_vae": ["--model.latent-channels INT"],
        "vae_decoder": ["--vae STR", "--model.latent-noise FLOAT"],
        "emoji_clip": ["--model.vocabulary INT"],
    }
    wanted += own.get(name, ["--vae STR", "--model.width INT", "--loss.perceptual FLOAT", "--objective.", "--guidance FLOAT"])
    for option in wanted:
        assert option in text
    assert f"(default: {PRESETS[name]().train.steps})" in text


def test_without_a_preset_the_usage_is_printed(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train"]) == cli.WRONG_INPUT
    assert "presets:" in capsys.readouterr().out


def test_settings_reach_the_run(calls: list[dict]):
    words = "--minutes 1.5 --resume --model.width 64 --train.batch-size 8 --train.betas 0.8 0.9 --clip None"
    words += " --model.conditioning concat --pairs.augment.no-flip --train.gradient-checkpointing --objective.shift 2"
    assert cli.main(["train", "edges2emoji", *HERE, *words.split()]) == cli.DONE
    (call,) = calls
    experiment = call["experiment"]
    assert (call["preset"], call["data"], call["out"]) == ("edges2emoji", Path("pairs"), Path("run"))
    assert (call["resume"], call["minutes"]) == (True, 1.5)
    assert (experiment.model.width, experiment.model.conditioning, experiment.clip) == (64, "concat", None)
    assert (experiment.train.batch_size, experiment.train.betas) == (8, (0.8, 0.9))
    assert not experiment.pairs.augment.flip
    assert experiment.train.gradient_checkpointing
    assert experiment.objective.shift == 2
    assert experiment.train.steps == PRESETS["edges2emoji"]().train.steps  # the rest is the preset's


def test_settings_may_be_written_with_underscores_and_equals_signs(calls: list[dict]):
    assert cli.main(["train", "edges2emoji", *HERE, "--train.batch_size=8"]) == cli.DONE
    assert calls[0]["experiment"].train.batch_size == 8


def test_the_result_is_told_as_json_or_as_a_line(calls: list[dict], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", "edges2emoji", *HERE, "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out) == {"out": "run", "steps": 7, "seconds": 12.3}
    assert cli.main(["train", "edges2emoji", *HERE]) == cli.DONE
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "done: 7 steps in 0.2 min; run\n")


@pytest.mark.parametrize(
    "words, reason",
    [
        (["edges2cats", *HERE], "edges2cats is no preset; there are edges2emoji, "),
        (["edges2emoji", *HERE, "--model.widht", "64"], "Unrecognized options: --model.widht, 64 (perhaps --model.width INT)"),
        (["edges2emoji", *HERE, "--model.depth", "deep"], "Error parsing --model.depth: "),
        (["edges2emoji", *HERE, "--model.conditioning", "none"], "invalid choice 'none' for argument '--model.conditioning'"),
        (["edges2emoji", "--data", "pairs"], "Missing from clipdit train edges2emoji: --out PATH"),
        (["edges2emoji", *HERE, "--train.steps", "0"], "Error parsing experiment.train: train.steps is 0; wanted at least 1"),
        (["edges2emoji", *HERE, "--train.lr", "-1"], "Error parsing experiment.train: train.lr is -1.0; wanted a finite number"),
        (["edges2emoji", *HERE, "--train.lr", "nan"], "Error parsing experiment.train: train.lr is nan; wanted a finite number"),
        (
            ["edges2emoji", *HERE, "--train.accumulate", "3"],
            "Error parsing experiment.train: train.batch_size 64 does not divide",
        ),
        (["edges2emoji", *HERE, "--model.heads", "3"], "Error parsing experiment.model: model.width 256 with 3 heads"),
        (["edges2emoji", *HERE, "--pairs.size", "0"], "Error parsing experiment.pairs: pairs.size is 0"),
        (["edges2emoji", *HERE, "--pairs.augment.views", "0"], "Error parsing experiment.pairs.augment: views is 0"),
        (
            ["edges2emoji", *HERE, "--loss.gate", "2"],
            "Error parsing experiment.loss: loss.gate is 2.0; wanted a number in [0, 1]",
        ),
        (["edges2emoji", *HERE, "--drop-condition", "2"], "drop_condition is 2.0; wanted a share in [0, 1]"),
        (["edges2emoji", *HERE, "--objective.std", "0"], "std is 0.0; wanted a finite number above 0"),
        (["emoji_vae", *HERE, "--model.channels", "7"], "Error parsing experiment.model: model.channels are (7,)"),
        (["vae_decoder", *HERE, "--model.recolour", "2"], "Error parsing experiment.model: model.recolour is 2.0"),
        (["emoji_clip", *HERE, "--model.width", "100"], "Error parsing experiment.model: model.width is 100"),
    ],
)
def test_mistakes_are_answered_in_one_line(words: list[str], reason: str, refused, calls: list[dict]):
    assert reason in refused(*words)
    assert calls == []


def test_a_data_folder_that_is_not_there_or_holds_no_pairs_is_named(refused, tiny_words, tmp_path: Path):
    def train_on(data: Path) -> str:
        words = tiny_words(tmp_path / "run")
        words[words.index("--data") + 1] = str(data)
        return refused(*words[1:])

    assert train_on(tmp_path / "nowhere").startswith(f"{tmp_path / 'nowhere'} does not exist; wanted a folder of pairs")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in train_on(tmp_path / "empty")
    write_image(tmp_path / "odd" / "1.png", torch.zeros(3, 20, 31, dtype=torch.uint8))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_unusable_images_is_named_with_each_image(tiny_words, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    odd = tmp_path / "odd"
    write_image(odd / "1.png", torch.zeros(3, 20, 31, dtype=torch.uint8))
    words = tiny_words(tmp_path / "run")
    words[words.index("--data") + 1] = str(odd)
    assert cli.main(words) == cli.WRONG_INPUT
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == f"warning: left out {odd / '1.png'}: is 31 x 20; a side-by-side image must have an even width"
    assert last == f"clipdit: {odd} holds no pairs to train on; `clipdit data check {odd}` says what was found"


@pytest.mark.parametrize("minutes", ["0", "-3", "nan"])
def test_minutes_must_be_some(minutes: str, tiny_words, refused, tmp_path: Path):
    assert refused(*tiny_words(tmp_path / "run", "--minutes", minutes)[1:]).startswith("minutes is ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_trains_on_two_processes_with_the_same_command(tiny_words, whole_run, history, tmp_path: Path):
    """18 s of processor time, most of it for importing torch three times; test_interruptions.py starts the ranks by itself."""
    folder = Path(sys.executable).parent
    launcher = [folder / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", folder / "clipdit"]
    done = subprocess.run([*launcher, *tiny_words(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for one, two in zip(history(whole_run), history(tmp_path / "run"), strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    assert done.stderr.count("done: 10 steps") == 1
