"""The training benchmark: turns are counted and timed rightly, and the whole of it runs on a tiny model."""

import json
import threading
import time
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from clipdit import cli
from clipdit.data.pairs import find_pairs
from clipdit.experiment import ModelSettings, PairSettings, TranslationExperiment
from clipdit.train.benchmark import OURS, PLAIN, Enough, Pace, PacedTask, Turn, measure, peak_memory_mib
from clipdit.train.loop import TrainSettings

CPU = torch.device("cpu")


class CountingTask:
    """Draws after 10 ms, and trains nothing."""

    module = torch.nn.Linear(1, 1)
    weights = {"loss": 1.0}  # noqa: RUF012  (nobody changes it)
    contested: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def draw(self, step: int) -> dict[str, torch.Tensor]:
        time.sleep(0.01)
        self.drawn.append(step)
        return {}

    def save(self, folder: Path) -> None: ...

    def sheet(self, path: Path) -> None: ...


def test_a_side_works_only_in_its_turn_and_reports_its_steps_and_times():
    parent, child = Pipe()
    task = CountingTask()
    paced = PacedTask(task, Pace(child, CPU, parameters=7))

    def loop() -> None:
        with pytest.raises(Enough):
            for step in range(100):
                paced.draw(step)
                time.sleep(0.01)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    time.sleep(0.05)
    assert task.drawn == []
    parent.send(3)
    first: Turn = parent.recv()
    assert task.drawn == [0, 1, 2]
    parent.send(2)
    second: Turn = parent.recv()
    parent.send(0)
    thread.join(timeout=10)
    assert task.drawn == [0, 1, 2, 3, 4]
    assert (first.steps, second.steps, first.parameters) == (3, 2, 7)
    assert 0.03 <= first.loading_s < first.seconds
    assert 0.06 <= first.seconds < 5
    assert 0.04 <= second.seconds < 5


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_mib(CPU)
    held = torch.ones(64 * 2**18)  # 64 MiB
    assert peak_memory_mib(CPU) >= before
    assert peak_memory_mib(CPU) > held.numel() * 4 / 2**20


@pytest.fixture
def experiment_and_data(tmp_path: Path) -> tuple[TranslationExperiment, Path]:
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=down, up_block_types=up, norm_num_groups=4, sample_size=32)
    vae.save_pretrained(tmp_path / "vae")
    data = tmp_path / "pairs"
    data.mkdir()
    for i in range(8):
        Image.effect_noise((64, 32), 60 + i).convert("RGB").save(data / f"{i}.png")
    experiment = TranslationExperiment(
        vae=str(tmp_path / "vae"),
        clip=None,
        pairs=PairSettings(size=32),
        model=ModelSettings(width=32, depth=2, heads=2, patch=2, conditioning="concat"),
        train=TrainSettings(batch_size=4),
    )
    return experiment, data


@pytest.mark.slow  # three processes, each of which imports torch and diffusers
@pytest.mark.timeout(900)
def test_both_loops_are_measured_on_equal_terms(experiment_and_data: tuple[TranslationExperiment, Path]):
    experiment, data = experiment_and_data
    pairs = find_pairs(data, group_near_duplicates=False).pairs
    result = json.loads(json.dumps(measure(experiment, pairs, seconds=0.5, rounds=2)))
    ours, plain = result["sides"][OURS], result["sides"][PLAIN]
    assert result["caching"]["pairs"] == 8
    assert len(result["sides"]) == 3
    for side in (ours, plain):
        assert side["images_per_s"]["count"] == 2
        assert side["images_per_s"]["median"] == pytest.approx(4000 / side["step_ms"]["median"], rel=0.3)
        assert 0 < side["loading_share"]["median"] < 1
        assert side["peak_memory_mib"] > side["memory_before_mib"] > 0
    assert result["speedup"]["count"] == 2
    assert plain["parameters_million"] > ours["parameters_million"] > 0.02


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (["--preset", "emoji_vae"], "emoji_vae is no preset that translates; there are "),
        (["--out", "numbers"], "numbers is no .json file"),
        (["--seconds", "0"], "seconds 0; wanted at least 1, and more than 0"),
        ([], "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    changes: list[str], complaint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "training", "--data", "nowhere", "--out", "numbers.json", *changes]) == cli.WRONG_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
