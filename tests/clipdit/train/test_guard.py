"""What watches over a run: it stops when it should, says why in one line, and does not stop otherwise."""

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from clipdit.train import guard
from clipdit.train.guard import Diverged, Interrupt, Interval, alone_in, check_plan, check_same_experiment, check_sane, flat
from clipdit.train.loop import TrainSettings
from clipdit.train.state import Progress


def row(total: float, **more: float) -> dict[str, float]:
    return {"loss/total": total, "gradient_norm": 1.0, **more}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["loss/total", "loss/perceptual", "gradient_norm"])
def test_a_number_that_is_none_stops_the_run_in_one_line(name: str, bad: float):
    with pytest.raises(Diverged) as caught:
        check_sane(row(1.0) | {name: bad}, Progress(step=120), TrainSettings(lr=0.25), saved=100)
    assert str(caught.value) == (
        f"{name} became {bad} by step 120; the checkpoint of step 100 is intact. Lower train.lr (now 0.25) or train.clip_norm, "
        "or take train.precision fp32"
    )


def test_a_loss_far_above_its_lowest_stops_the_run_in_one_line():
    settings = TrainSettings(divergence=10, lr=0.25)
    check_sane(row(9.9), Progress(step=40, lowest_loss=1.0), settings, saved=20)
    with pytest.raises(
        Diverged, match=r"the loss is 10.1 at step 40, more than 10 times its lowest, 1; the checkpoint of step 20"
    ):
        check_sane(row(10.1), Progress(step=40, lowest_loss=1.0), settings, saved=20)


def test_a_loss_that_is_rounding_may_vary_and_what_leaves_it_is_a_divergence():
    rounding = Progress(step=120, lowest_loss=1.6e-9)
    check_sane(row(2.1e-8), rounding, TrainSettings(divergence=10), saved=0)
    with pytest.raises(Diverged, match="more than 10 times its lowest"):
        check_sane(row(1.1e-5), rounding, TrainSettings(divergence=10), saved=0)


def test_the_first_loss_and_losses_below_zero_are_no_divergence():
    check_sane(row(1e6), Progress(), TrainSettings(), saved=0)
    check_sane(row(5.0), Progress(lowest_loss=-1.0), TrainSettings(), saved=0)


def test_a_changed_setting_is_named():
    began = {"train": {"lr": 0.1, "steps": 10}, "model": {"width": 64}, "pairs": {"cache": None}}

    def resumed(**changes) -> None:
        check_same_experiment(json.dumps(began), {**began, **changes})

    resumed()
    resumed(train={"lr": 0.1, "steps": 20})  # a run can be prolonged
    with pytest.raises(ValueError, match=r"the run began with model.width = 64, now it is 32; resume with what it began with"):
        resumed(model={"width": 32})
    with pytest.raises(ValueError, match=r"model.depth = None, now it is 3"):
        resumed(model={"width": 64, "depth": 3})
    with pytest.raises(ValueError, match=r"pairs.cache = None, now it is '/c'"):
        resumed(pairs={"cache": "/c"})
    with pytest.raises(ValueError, match=r"train.lr = 0.1, now it is None"):
        resumed(train={"steps": 10})


def test_other_data_is_named_where_both_sides_tell_it():
    began = {"seed": 0, "data": {"pairs": 12, "pairs_sha256": "ab"}}
    check_same_experiment(json.dumps(began), {"seed": 0})
    check_same_experiment('{"seed": 0}', began)
    with pytest.raises(ValueError, match=r"data.pairs = 12, now it is 11"):
        check_same_experiment(json.dumps(began), {"seed": 0, "data": {"pairs": 11, "pairs_sha256": "ab"}})


def test_a_plan_that_cannot_be_is_refused():
    check_plan(TrainSettings(batch_size=12, accumulate=2), 0.5, processes=3)
    check_plan(TrainSettings(), None, processes=1)
    with pytest.raises(ValueError, match=r"train.batch_size 12 does not divide among 4 processes x 2 parts"):
        check_plan(TrainSettings(batch_size=12, accumulate=2), None, processes=4)
    for minutes in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"minutes is .*; wanted a number above 0"):
            check_plan(TrainSettings(), minutes, processes=1)


def test_settings_are_named_by_their_path():
    assert flat({"a": 1, "b": {"c": [2], "d": {"e": None}}}) == {"a": 1, "b.c": [2], "b.d.e": None}


def test_a_signal_is_noted_and_its_echo_ignored_but_a_later_one_breaks_off(monkeypatch: pytest.MonkeyPatch):
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt.asked
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # at once: torchrun passes on what the terminal has sent already
        assert interrupt.asked
        now = time.monotonic()
        monkeypatch.setattr(guard.time, "monotonic", lambda: now + 2)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)  # the handler runs between two instructions
    assert signal.getsignal(signal.SIGINT) is before


def test_means_are_over_the_steps_of_the_interval():
    interval = Interval()
    for value in (1.0, 2.0, 6.0):
        interval.add("total", torch.tensor(value))
        interval.add("gradient_norm", torch.tensor(10 * value))
        interval.steps += 1
        interval.loading_s += 0.001
    time.sleep(0.01)
    means = interval.means(Accelerator())
    assert means["loss/total"] == 3
    assert means["gradient_norm"] == 30
    assert 0 < means["loading_share"] <= 0.3
    assert 0 < means["steps_per_s"] <= 300


def test_two_runs_cannot_write_into_one_folder(tmp_path: Path):
    with alone_in(tmp_path / "run"):
        with pytest.raises(ValueError, match=r"another process is training into .*run; wait for it, or give another folder"):
            alone_in(tmp_path / "run").__enter__()
        with alone_in(tmp_path / "other"):
            pass
    with alone_in(tmp_path / "run"):
        pass


def test_a_setting_that_came_later_does_not_stop_an_older_run():
    began = json.dumps({"train": {"lr": 1.0}, "model": {"width": 32}})
    check_same_experiment(began, {"train": {"lr": 1.0, "fused": False}, "model": {"width": 32, "mlp": "gelu"}})
    check_same_experiment('{"train": {"lr": 1.0}}', {"train": {"lr": 1.0, "fused": False}})  # one without a DiT
    with pytest.raises(ValueError, match=r"the run began with model\.mlp = 'gelu', now it is 'swiglu'"):
        check_same_experiment(began, {"train": {"lr": 1.0, "fused": False}, "model": {"width": 32, "mlp": "swiglu"}})
