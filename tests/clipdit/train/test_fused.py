"""`--train.fused` changes the speed and not what is learnt. Here its kernels run in Triton's interpreter."""

from pathlib import Path

import pytest
import torch

from clipdit.train import runs
from clipdit.train.runs import fused_operations, run

launch = pytest.importorskip("clipdit_kernels.launch")
CPU = torch.device("cpu")


def test_a_run_with_fused_operations_learns_the_same(tiny_experiment, history, pairs_folder: Path, tmp_path: Path, monkeypatch):
    used = []

    def noted(device):
        used.append(fused_operations(device))
        return used[-1]

    monkeypatch.setattr(runs, "fused_operations", noted)
    for fused in (False, True):
        experiment = tiny_experiment(train={"steps": 3, "batch_size": 4, "log_every": 1, "fused": fused})
        run(experiment, "edges2emoji", pairs_folder, tmp_path / str(fused))
    assert len(used) == 1
    plain, fused = (history(tmp_path / str(fused)) for fused in (False, True))
    assert len(plain) == 3
    for one, other in zip(plain, fused, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_where_kernels_cannot_run_it_says_so_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"train\.fused: fused kernels run on NVIDIA GPUs, not on cpu; leave it out"):
        fused_operations(CPU)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(runs, "entry_points", lambda group: [])
    with pytest.raises(ValueError, match=r"train\.fused needs fused operations, and this installation has none"):
        fused_operations(CPU)


def test_a_preset_without_a_dit_refuses_it(tiny_experiment, pairs_folder: Path, tmp_path: Path):
    from clipdit.experiment import AutoencoderExperiment, PairSettings
    from clipdit.train.loop import TrainSettings

    experiment = AutoencoderExperiment(pairs=PairSettings(size=32), train=TrainSettings(steps=1, fused=True))
    with pytest.raises(
        ValueError, match=r"train\.fused is for presets that train a DiT, and emoji_vae trains none; leave it out"
    ):
        run(experiment, "emoji_vae", pairs_folder, tmp_path / "out")
