"""The state of a run: what comes back is bitwise what went in, and what is damaged or another's is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clipdit.train.state import STATE_FILE, Progress, load_state, read_progress, save_state, save_tensors


class Run:
    """A small network that trains on noise: convolutions in channels-last order, as the VAE's are, and vectors."""

    def __init__(self, width: int = 6) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Conv2d(3, width, 3), nn.GroupNorm(2, width), nn.Conv2d(width, 3, 3))
        self.module.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1, fused=True)
        self.averages = [p.detach().clone() for p in self.module.parameters()]

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.module.named_parameters())

    def step(self, number: int) -> None:
        image = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(number))
        self.module(image).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average, p in zip(self.averages, self.module.parameters(), strict=True):
            average.lerp_(p.detach(), 0.5)

    def save(self, folder: Path, progress: Progress) -> None:
        save_state(folder, self.parameters, self.averages, self.optimizer, progress)

    def load(self, folder: Path) -> Progress:
        return load_state(folder, self.parameters, self.averages, self.optimizer)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the state of a run after two steps."""
    run = Run()
    for number in range(2):
        run.step(number)
    run.save(tmp_path, Progress(step=2, seconds=1.5, lowest_loss=0.25, experiment='{"a": 1}'))
    return tmp_path


def test_a_loaded_run_goes_on_bitwise_as_the_one_that_was_saved(saved: Path):
    whole, resumed = Run(), Run()
    for number in range(5):
        whole.step(number)
    assert resumed.load(saved) == Progress(step=2, seconds=1.5, lowest_loss=0.25, experiment='{"a": 1}')
    for number in range(2, 5):
        resumed.step(number)
    for one, other in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(whole.optimizer.state[one]["exp_avg_sq"], resumed.optimizer.state[other]["exp_avg_sq"])
    assert all(torch.equal(one, other) for one, other in zip(whole.averages, resumed.averages, strict=True))


def test_a_state_without_averages_or_steps_comes_back(tmp_path: Path):
    run, other = Run(), Run()
    with torch.no_grad():
        run.module[0].weight.fill_(2)
    save_state(tmp_path, run.parameters, None, run.optimizer, Progress())
    assert load_state(tmp_path, other.parameters, None, other.optimizer) == Progress()
    assert (other.module[0].weight == 2).all()
    other.step(0)


def test_the_state_of_another_network_is_refused_and_changes_nothing(saved: Path):
    def refused(run: Run, reason: str) -> None:
        before = [p.detach().clone() for p in run.module.parameters()]
        with pytest.raises(ValueError, match=reason) as caught:
            run.load(saved)
        assert str(saved / STATE_FILE) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(p, old) for p, old in zip(run.module.parameters(), before, strict=True))

    refused(Run(width=8), r"belongs to another network: 0\.weight is \[6, 3, 3, 3\] there, \[8, 3, 3, 3\] here")
    longer = Run()
    longer.module.append(nn.Linear(2, 2))
    longer.averages += [p.detach().clone() for p in longer.module[3].parameters()]
    refused(longer, r"belongs to another network: 3\.bias is on one side only")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_state_is_refused_in_one_line(saved: Path, share: float):
    file = saved / STATE_FILE
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"is damaged .*; start again in another folder") as caught:
        Run().load(saved)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("metadata", [None, {}, {"progress": "{"}, {"progress": '{"stp": 3}'}, {"progress": "3"}])
def test_a_file_that_is_no_state_is_refused_in_one_line(tmp_path: Path, metadata: dict | None):
    save_file({"x": torch.zeros(2)}, tmp_path / STATE_FILE, metadata=metadata)
    with pytest.raises(ValueError, match=r"is damaged") as caught:
        read_progress(tmp_path)
    assert "\n" not in str(caught.value)


def test_nothing_to_resume_says_what_to_do(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"holds no training_state.safetensors, so there is nothing to resume; leave out --resume"
    ):
        read_progress(tmp_path / "new")


def test_a_disk_that_takes_no_more_leaves_the_last_state_and_says_so(saved: Path, monkeypatch: pytest.MonkeyPatch):
    from safetensors import SafetensorError

    from clipdit.train import state

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    before = (saved / STATE_FILE).read_bytes()
    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(OSError, match=r"was not written: .*No space left.* What was saved before is intact; free some space"):
        save_tensors(saved / STATE_FILE, {"x": torch.zeros(1)})
    assert (saved / STATE_FILE).read_bytes() == before
    assert [path.name for path in saved.iterdir()] == [STATE_FILE]
