"""What machines do to a job: each fault ends in the right status, and no half of an output is ever seen."""

import errno
import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from job_pictures import contents, draw, ledger

from clipdit.cli import main
from clipdit.fake_backend import FakeBackend
from clipdit.offline import Item, JobFolder, progress, run_job, verify_job
from clipdit.offline.steps import quarantine
from clipdit.translator import Translator


def translator_that(before_batch) -> Translator:
    return Translator(FakeBackend(native_size=(32, 32), on_call=lambda call, batch: before_batch()))


def report(out: Path) -> dict:
    return json.loads((out / "progress.json").read_text())


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_what_stops_all_writing_ends_in_one_line_and_a_resume_makes_the_rest(
    translator, inputs, tmp_path, monkeypatch, capsys, fault
):
    replace, count = os.replace, 0

    def fails(source, target):
        nonlocal count
        count += str(target).endswith(".png")
        if count > 9:
            raise OSError(fault, os.strerror(fault), str(source), None, str(target))
        replace(source, target)

    out = tmp_path / "out"
    words = ["translate", str(inputs), str(out), "--backend", "fake", "--batch-size", "3"]
    monkeypatch.setattr(os, "replace", fails)
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipdit: ")]
    assert os.strerror(fault) in line and ".png" in line and "of 20 inputs are finished" in line and "--resume" in line
    monkeypatch.undo()
    assert contents(out).keys() >= {row["output"] for row in ledger(out)} and len(contents(out)) == 9
    assert not list(out.rglob("*.part"))
    assert main([*words, "--resume"]) == 0 and main(["verify", str(out)]) == 0
    assert report(out)["state"] == "done"


def test_an_output_folder_that_cannot_be_made_is_one_line(inputs, tmp_path, monkeypatch, capsys):
    def read_only(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert main(["translate", str(inputs), str(tmp_path / "out"), "--backend", "fake"]) == 2
    assert "Read-only file system" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_input_that_vanishes_or_changes_after_the_plan_is_taken_as_it_is_when_it_is_read(translator, inputs, tmp_path):
    (tmp_path / "cut.jpg").write_bytes((inputs / "sub" / "19.jpg").read_bytes()[:200])
    draw(tmp_path / "new.webp", 30, 30, seed=99)

    def once():
        if (inputs / "18.png").exists():
            (inputs / "18.png").unlink()
            os.replace(tmp_path / "cut.jpg", inputs / "sub" / "19.jpg")
            os.replace(tmp_path / "new.webp", inputs / "sub" / "deep" / "17.webp")

    out = tmp_path / "out"
    summary = run_job(translator_that(once), inputs, out, batch_size=1, workers=1)
    assert (summary.written, summary.quarantined) == (18, 2)
    reasons = dict(verify_job(out).quarantined)
    assert reasons["18.png"] == "does not exist" and "damaged" in reasons["sub/19.jpg"]
    run_job(translator, inputs, tmp_path / "now")
    assert contents(out)["sub/deep/17.png"] == contents(tmp_path / "now")["sub/deep/17.png"]
    assert report(out)["reasons"] == dict.fromkeys(reasons.values(), 1)


def test_an_input_that_may_not_be_read_is_quarantined(translator, inputs, tmp_path, monkeypatch):
    opened = Path.open

    def guarded(self, *arguments, **options):
        if self.name == "00.png" and "in" in self.parts:  # whoever runs the tests as root may read everything
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", guarded)
    run_job(translator, inputs, tmp_path / "out")
    assert dict(verify_job(tmp_path / "out").quarantined) == {"00.png": "cannot be opened: Permission denied"}


def test_links_in_a_circle_are_named_and_not_followed(translator, inputs, tmp_path):
    (inputs / "sub" / "up").symlink_to("..")
    (inputs / "itself.png").symlink_to("itself.png")
    summary = run_job(translator, inputs, tmp_path / "out")
    assert (summary.written, summary.quarantined, summary.ignored) == (20, 1, 1)
    assert "Too many levels of symbolic links" in dict(verify_job(tmp_path / "out").quarantined)["itself.png"]


def test_a_clock_that_jumps_spoils_neither_the_job_nor_its_rate(inputs, tmp_path, monkeypatch):
    class Jumping(datetime):
        shift = timedelta()

        @classmethod
        def now(cls, tz=None):
            cls.shift = -2 * cls.shift - timedelta(days=1)
            return datetime.now(tz) + cls.shift

    monkeypatch.setattr(progress, "datetime", Jumping)
    monkeypatch.setattr(time, "time", lambda: Jumping.now(UTC).timestamp())
    monkeypatch.setattr(progress, "WRITE_INTERVAL_S", 0.0)
    slow = Translator(FakeBackend(native_size=(32, 32), delay_s=0.005))
    summary = run_job(slow, inputs, tmp_path / "out", batch_size=2)
    assert verify_job(tmp_path / "out").ok and 0.05 < summary.seconds < 60
    assert 20 / 60 < report(tmp_path / "out")["images_per_s"] < 20 / 0.05


class TestProgress:
    def test_it_tells_where_a_job_is_and_how_it_ended(self, inputs, tmp_path, monkeypatch):
        monkeypatch.setattr(progress, "WRITE_INTERVAL_S", 0.0)
        (inputs / "bad.png").write_text("bad")
        out, seen = tmp_path / "out", []
        translator = Translator(FakeBackend(native_size=(32, 32)))
        run_job(translator, inputs, out, batch_size=4, on_progress=lambda _: seen.append(report(out) if seen else None))
        running = seen[1:]
        assert len(running) >= 5 and {r["state"] for r in running} == {"running"}
        assert [r["finished"] for r in running] == sorted(r["finished"] for r in running)
        end = report(out)
        assert (end["state"], end["engine"], end["total"], end["finished"], end["written"]) == ("done", "local", 21, 21, 20)
        assert end["quarantined"] == 1 and end["reasons"] == {"is text, not an image": 1}
        assert datetime.fromisoformat(end["started"]) <= datetime.fromisoformat(end["updated"])
        run_job(translator, inputs, out, resume=True)
        assert (report(out)["kept"], report(out)["written"], report(out)["finished"]) == (20, 0, 21)

    def test_it_is_written_once_a_second_at_most(self, translator, inputs, tmp_path, monkeypatch):
        written = []
        monkeypatch.setattr(JobFolder, "write_progress", lambda self, report: written.append(report["state"]))
        run_job(translator, inputs, tmp_path / "out", batch_size=1)
        assert written[0] == "running" and written[-1] == "done" and len(written) <= 3

    def test_an_interrupted_and_a_failed_job_say_so(self, inputs, tmp_path):
        for error, state in ((KeyboardInterrupt, "interrupted"), (RuntimeError, "failed")):

            def raises(error=error):
                raise error

            with pytest.raises(error):
                run_job(translator_that(raises), inputs, tmp_path / "out", resume=True)
            assert report(tmp_path / "out")["state"] == state

    def test_a_progress_file_that_cannot_be_written_costs_a_warning(self, translator, inputs, tmp_path, monkeypatch, caplog):
        def fails(self, report):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(JobFolder, "write_progress", fails)
        assert run_job(translator, inputs, tmp_path / "out").written == 20
        assert caplog.text.count("progress.json cannot be written") == 1

    def test_reasons_without_end_are_counted_together(self, tmp_path):
        folder = JobFolder(tmp_path / "out")
        with folder.open():
            tally = progress.Tally(folder, engine="local", total=500, kept=0, on_progress=None)
            items = [Item(id=str(i), source=str(i), output=f"{i}.png", seed=0) for i in range(500)]
            tally.add([quarantine(item, f"has {item.id} faults", 0.0) for item in items])
            tally.end("done")
        reasons = report(tmp_path / "out")["reasons"]
        assert len(reasons) == progress.MAX_REASONS + 1 and sum(reasons.values()) == 500
