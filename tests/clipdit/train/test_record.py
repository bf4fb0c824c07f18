"""The written history: rows survive a kill, a resumed run cuts off what it does again, pictures are whole."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipdit.train.record import HISTORY_FILE, Record, read_history, smoothed


def filled(folder: Path, steps: int) -> Record:
    record = Record(folder, step=0)
    for step in range(1, steps + 1):
        record.add({"step": step, "loss/total": 1 / step, "loss/extra": 0.0, "lr": 0.5})
    return record


def test_every_row_is_in_the_file_as_soon_as_it_is_added(tmp_path: Path):
    record = filled(tmp_path, 3)
    assert read_history(tmp_path) == record.rows
    assert [row["loss/total"] for row in record.rows] == [1, 1 / 2, 1 / 3]


def test_a_resumed_record_forgets_what_came_after_its_checkpoint(tmp_path: Path):
    filled(tmp_path, 5).close()
    record = Record(tmp_path, step=3)
    record.add({"step": 4, "loss/total": 9.0})
    assert [row["step"] for row in read_history(tmp_path)] == [1, 2, 3, 4]
    assert read_history(tmp_path)[3]["loss/total"] == 9.0


def test_a_line_cut_off_by_a_kill_is_left_out_and_written_anew(tmp_path: Path):
    filled(tmp_path, 3).close()
    file = tmp_path / HISTORY_FILE
    file.write_bytes(file.read_bytes()[:-10])
    assert [row["step"] for row in read_history(tmp_path)] == [1, 2]
    record = Record(tmp_path, step=3)
    record.add({"step": 3, "loss/total": 3.0})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


def test_tensorboard_shows_each_step_once_after_a_resumption(tmp_path: Path):
    filled(tmp_path, 5).close()
    record = Record(tmp_path, step=3)
    record.add({"step": 4, "loss/total": 9.0})
    record.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {event.step: event.value for event in events.Scalars("loss/total")}
    assert {step: scalars[step] for step in (1, 2, 3, 4)} == pytest.approx({1: 1, 2: 1 / 2, 3: 1 / 3, 4: 9})


def test_the_loss_curve_is_a_whole_picture_with_a_panel_for_each_loss(tmp_path: Path):
    record = filled(tmp_path, 1)
    record.plot()
    assert not (tmp_path / "loss_curve.png").exists()  # nothing to draw yet
    record = filled(tmp_path / "more", 30)
    record.plot()
    with Image.open(tmp_path / "more" / "loss_curve.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.height > 400
        assert sum(count > 0 for count in picture.convert("L").histogram()) > 20
    assert not list((tmp_path / "more").glob(".*"))


def test_a_full_disk_is_named_with_the_file(tmp_path: Path):
    record = filled(tmp_path, 1)
    file = tmp_path / HISTORY_FILE
    file.unlink()
    file.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        record.add({"step": 2, "loss/total": 1.0})
    assert caught.value.filename == str(file)


def test_smoothing_keeps_what_is_smooth_and_does_not_lag():
    assert smoothed([]) == [] and smoothed([3.0]) == pytest.approx([3.0])
    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    ramp = [float(i) for i in range(101)]
    assert smoothed(ramp)[40:61] == pytest.approx(ramp[40:61], abs=0.01)
    noisy = [value + (-1) ** i for i, value in enumerate(ramp)]
    assert smoothed(noisy)[40:61] == pytest.approx(ramp[40:61], abs=0.3)


def test_no_history_is_no_rows(tmp_path: Path):
    assert read_history(tmp_path) == []
