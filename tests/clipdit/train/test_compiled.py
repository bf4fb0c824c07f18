"""`--train.compile` changes the speed and not what is learnt."""

from pathlib import Path

import pytest

PIXEL_LOSSES = [
    "--loss.clip-similarity", "1", "--loss.perceptual", "1", "--loss.perceptual-network", "efficientnet-lite0",
    "--loss.fraction", "0.5", "--loss.gate", "0.4", "--train.batch-size", "8",
]  # fmt: skip
"""So that another number of images is looked at in every step."""


@pytest.mark.slow  # a minute of compiling
@pytest.mark.parametrize("options", [[], PIXEL_LOSSES], ids=["plain", "pixel losses"])
def test_a_compiled_translation_learns_what_an_eager_one_does(options, tiny_words, start_training, history, tmp_path: Path):
    for name, more in (("eager", []), ("compiled", ["--train.compile"])):
        training = start_training(tiny_words(tmp_path / name, *options, *more))
        assert training.wait() == 0, training.output
    for eager, compiled in zip(history(tmp_path / "eager"), history(tmp_path / "compiled"), strict=True):
        assert compiled == pytest.approx(eager, rel=1e-3)


@pytest.mark.slow  # half a minute of compiling
def test_a_compiled_vae_learns_what_an_eager_one_does(pairs_folder: Path, start_training, history, tmp_path: Path):
    words = [
        "train", "emoji_vae", "--data", str(pairs_folder), "--pairs.size", "32",
        "--model.crop", "16", "--model.channels", "8", "8", "--model.perceptual", "None",
        "--train.steps", "6", "--train.batch-size", "8", "--train.precision", "fp32", "--train.log-every", "1",
    ]  # fmt: skip
    for name, more in (("eager", []), ("compiled", ["--train.compile"])):
        training = start_training([*words, "--out", str(tmp_path / name), *more])
        assert training.wait() == 0, training.output
    for eager, compiled in zip(history(tmp_path / "eager"), history(tmp_path / "compiled"), strict=True):
        assert compiled == pytest.approx(eager, rel=1e-3)
