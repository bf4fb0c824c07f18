"""The loop: parts of a batch add up to it, the checkpoint holds the average, and a run that goes wrong stops in good order."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clipdit.train.guard import Diverged
from clipdit.train.loop import TrainSettings, learning_rate, make_optimizer, resolve_precision, train
from clipdit.train.order import step_generator
from clipdit.train.record import Record, read_history
from clipdit.train.state import STATE_FILE, Progress, read_progress, save_tensors
from clipdit.train.task import Batch, Losses


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes far longer than these trainings; test_record.py looks at the pictures."""
    monkeypatch.setattr(Record, "plot", lambda self: None)


class LineModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, batch: Batch) -> Losses:
        error = (self.layer(batch["x"]) - batch["y"]).square().mean(1)
        # the second loss looks at some of the images only
        return {"square": error, "gated": torch.where(batch["x"][:, 0] > 0, error, 0.0), "seen": error.detach() * 7}


class Line:
    """Fits y = A x from noise. A task of the smallest kind."""

    weights = {"square": 1.0, "gated": 0.5}  # noqa: RUF012  (nobody changes it)
    contested: frozenset[str] = frozenset()

    def __init__(self, size: int = 8, spoil: Callable[[int, Tensor], Tensor] = lambda step, y: y) -> None:
        self.module, self.size, self.spoil = LineModule(), size, spoil
        self.sheets: list[Path] = []
        self.modes: list[bool] = []

    def draw(self, step: int) -> Batch:
        x = torch.randn(self.size, 3, generator=step_generator(0, step))
        return {"x": x, "y": self.spoil(step, x @ torch.tensor([[1.0, -1.0], [0.5, 2.0], [0.0, 1.0]]))}

    def save(self, folder: Path) -> None:
        self.modes.append(self.module.training)
        save_tensors(folder / "line.safetensors", self.module.state_dict())

    def sheet(self, path: Path) -> None:
        self.sheets.append(path)

    @property
    def weight(self) -> Tensor:
        return self.module.layer.weight.detach().clone()


def settings(**changes) -> TrainSettings:
    fast = {"steps": 12, "batch_size": 8, "lr": 0.05, "warmup_steps": 2, "precision": "fp32", "log_every": 1, "save_every": 4}
    return TrainSettings(**{**fast, **changes})


def run(out: Path, task: Line | None = None, **changes) -> Line:
    task = task or Line()
    train(task, settings(**changes), out, experiment={"settings": "these"})
    return task


def saved_weight(out: Path) -> Tensor:
    from safetensors.torch import load_file

    return load_file(out / "line.safetensors")["layer.weight"]


def test_losses_fall_and_every_step_is_in_the_history(tmp_path: Path):
    run(tmp_path, steps=60, log_every=5, save_every=60)
    rows = read_history(tmp_path)
    assert [row["step"] for row in rows] == list(range(5, 61, 5))
    assert rows[-1]["loss/total"] < 0.2 * rows[0]["loss/total"]
    for row in rows:
        assert row["loss/total"] == pytest.approx(row["loss/square"] + 0.5 * row["loss/gated"], rel=1e-5)
        assert row["loss/seen"] == pytest.approx(7 * row["loss/square"], rel=1e-5)  # reported, though not minimised
        assert row["images_per_s"] > 0
        assert 0 <= row["loading_share"] <= 1


def test_what_is_contested_is_minimised_but_is_not_in_the_total(tmp_path: Path):
    task = Line()
    task.contested = frozenset({"gated"})
    run(tmp_path / "contested", task)
    assert torch.equal(task.weight, run(tmp_path / "plain").weight)
    for row in read_history(tmp_path / "contested"):
        assert row["loss/total"] == row["loss/square"] and row["loss/gated"] > 0


def test_parts_of_a_batch_add_up_to_the_whole(tmp_path: Path):
    whole = run(tmp_path / "1")
    for parts in (2, 4):
        task = run(tmp_path / str(parts), accumulate=parts)
        torch.testing.assert_close(task.weight, whole.weight, rtol=1e-5, atol=1e-6)
        for one, other in zip(read_history(tmp_path / "1"), read_history(tmp_path / str(parts)), strict=True):
            for name in ("loss/square", "loss/gated", "loss/total", "gradient_norm"):
                assert other[name] == pytest.approx(one[name], rel=1e-5)


def test_the_checkpoint_holds_the_average_and_training_goes_on_with_the_weights(tmp_path: Path):
    seen = []

    class Watched(Line):
        def draw(self, step: int) -> Batch:
            seen.append(self.weight)
            return super().draw(step)

    task = run(tmp_path, Watched(), ema_decay=0.6)
    weights = [*seen[1:], task.weight]  # after each step
    average = seen[0]
    for n, weight in enumerate(weights):
        decay = min(0.6, (1 + n) / (10 + n)) if n else 0.0
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(saved_weight(tmp_path), average, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(average, task.weight, rtol=1e-3)
    assert task.modes == [False] * 4  # at the start and three times
    assert task.module.training


def test_frozen_parts_are_not_trained_and_not_in_the_state(tmp_path: Path):
    from safetensors import safe_open

    before = Line().module.frozen.weight
    assert torch.equal(run(tmp_path).module.frozen.weight, before)
    with safe_open(tmp_path / STATE_FILE, framework="pt") as state:
        assert not [key for key in state.keys() if "frozen" in key]  # noqa: SIM118  (no dict)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_number_stops_the_run_and_leaves_the_last_save(tmp_path: Path, bad: float):
    good = tmp_path / "good"
    run(good, steps=8)
    task = Line(spoil=lambda step, y: y * bad if step == 9 else y)
    with pytest.raises(Diverged, match=r"by step 10; the checkpoint of step 8 is intact. Lower train.lr \(now 0.05\)"):
        run(tmp_path / "bad", task, schedule="constant")
    assert read_progress(tmp_path / "bad").step == 8
    assert saved_weight(tmp_path / "bad").isfinite().all()
    assert [row["step"] for row in read_history(tmp_path / "bad")] == list(range(1, 10))


def test_a_broken_number_between_two_rows_is_noticed_before_the_save(tmp_path: Path):
    task = Line(spoil=lambda step, y: y * math.nan if step == 1 else y)
    with pytest.raises(Diverged, match=r"by step 4; the checkpoint of step 0 is intact"):
        run(tmp_path, task, log_every=100)
    assert torch.equal(saved_weight(tmp_path), Line().weight)


def test_a_diverging_loss_stops_the_run(tmp_path: Path):
    task = Line(spoil=lambda step, y: y * (1 if step < 6 else 100))
    with pytest.raises(Diverged, match=r"at step 7, more than 10 times its lowest.*the checkpoint of step 4 is intact"):
        run(tmp_path, task)
    assert read_progress(tmp_path).step == 4


def test_the_lowest_loss_survives_a_resumption(tmp_path: Path):
    run(tmp_path, steps=8)
    task = Line(spoil=lambda step, y: y * 100)
    with pytest.raises(Diverged, match=r"at step 9"):
        train(task, settings(steps=12), tmp_path, experiment={"settings": "these"}, resume=True)


def test_minutes_end_a_run_with_a_save_and_a_sheet(tmp_path: Path):
    task = Line()
    progress = train(task, settings(steps=10**6, save_every=10**6, divergence=1e9), tmp_path, experiment={}, minutes=0.5 / 60)
    assert 0 < progress.step < 10**6
    assert 0.5 <= progress.seconds < 60
    assert read_progress(tmp_path).step == progress.step
    assert task.sheets == [tmp_path / "samples" / f"step-{progress.step:06d}.png"]
    rows = read_history(tmp_path)
    assert rows[-1]["lr"] < 0.8 * max(row["lr"] for row in rows)  # it fell with the time
    again = train(
        Line(), settings(steps=10**6, save_every=10**6, divergence=1e9), tmp_path, experiment={}, resume=True, minutes=0.5 / 60
    )
    assert again.step == progress.step  # all minutes are spent


def test_a_finished_run_can_be_prolonged(tmp_path: Path):
    whole = run(tmp_path / "whole", schedule="constant")
    first = {"train": {"steps": 6}}
    train(Line(), settings(steps=6, schedule="constant"), tmp_path / "two", experiment=first)
    second = Line()
    train(second, settings(schedule="constant"), tmp_path / "two", experiment={"train": {"steps": 12}}, resume=True)
    assert torch.equal(second.weight, whole.weight)
    assert torch.equal(saved_weight(tmp_path / "two"), saved_weight(tmp_path / "whole"))


def test_a_checkpoint_that_a_kill_kept_from_being_written_is_written_at_the_next_start(tmp_path: Path):
    run(tmp_path)
    wanted = saved_weight(tmp_path)
    (tmp_path / "line.safetensors").unlink()
    progress = train(Line(), settings(), tmp_path, experiment={"settings": "these"}, resume=True)
    assert progress.step == 12
    assert torch.equal(saved_weight(tmp_path), wanted)


def test_on_save_is_told_at_the_start_and_after_each_save(tmp_path: Path):
    told: list[Progress] = []
    train(Line(), settings(steps=10), tmp_path, experiment={}, on_save=told.append)
    assert [progress.step for progress in told] == [0, 4, 8, 10]


def test_sheets_come_as_often_as_asked_and_at_the_end(tmp_path: Path):
    task = run(tmp_path, steps=10, sheet_every=4)
    assert [path.name for path in task.sheets] == ["step-000004.png", "step-000008.png", "step-000010.png"]


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"train.batch_size 8 does not divide into 3 parts; change one"):
        settings(accumulate=3)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0}, {"batch_size": 0}, {"accumulate": 0}, {"log_every": 0}, {"save_every": 0}, {"sheet_every": -1},
        {"lr": 0.0}, {"lr": math.nan}, {"lr": math.inf}, {"clip_norm": 0.0}, {"divergence": 1.0}, {"divergence": math.nan},
        {"ema_decay": 1.0}, {"ema_decay": -0.1}, {"warmup_steps": -1}, {"weight_decay": -1.0}, {"seed": -1},
        {"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(change: dict):
    (name,) = change
    with pytest.raises(ValueError, match=f"train.{name} (is|are) .*wanted"):
        TrainSettings(**change)


def test_the_rate_rises_then_falls_to_a_tenth_by_steps_or_by_time():
    chosen = TrainSettings(steps=1000, lr=2.0, warmup_steps=100)
    assert learning_rate(chosen, 0) == pytest.approx(0.02)
    assert learning_rate(chosen, 99) == learning_rate(chosen, 100) == pytest.approx(2.0)
    assert learning_rate(chosen, 550) == pytest.approx(1.1)
    assert learning_rate(chosen, 1000) == learning_rate(chosen, 5000) == pytest.approx(0.2)
    assert learning_rate(chosen, 550, spent=1.0) == pytest.approx(0.2)
    assert learning_rate(chosen, 550, spent=0.1) == pytest.approx(1.1)
    constant = TrainSettings(steps=1000, lr=2.0, warmup_steps=0, schedule="constant")
    assert {learning_rate(constant, step, spent=0.9) for step in (0, 500, 999)} == {2.0}


def test_vectors_are_not_decayed():
    optimizer = make_optimizer(Line(), settings(weight_decay=0.3))
    decay = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {(2, 3): 0.3, (2,): 0.0}


def test_precision_is_what_was_asked_for():
    cpu = torch.device("cpu")
    assert resolve_precision("fp32", cpu) == "no"
    assert resolve_precision("bf16", cpu) == "bf16"


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "chosen"), [(True, True, "bf16"), (True, False, "bf16"), (False, True, "bf16"), (False, False, "no")]
)
def test_auto_is_bf16_on_processors_that_multiply_it(monkeypatch: pytest.MonkeyPatch, amx: bool, avx512_bf16: bool, chosen: str):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert resolve_precision("auto", torch.device("cpu")) == chosen


def test_two_trainings_in_one_process_may_differ_in_precision(tmp_path: Path):
    exact, rounded = run(tmp_path / "fp32"), run(tmp_path / "bf16", precision="bf16")
    assert exact.module.layer.weight.dtype == rounded.module.layer.weight.dtype == torch.float32
    assert not torch.equal(exact.weight, rounded.weight)
    torch.testing.assert_close(exact.weight, rounded.weight, rtol=0.1, atol=0.05)
    losses = [read_history(tmp_path / name)[-1]["loss/total"] for name in ("fp32", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
