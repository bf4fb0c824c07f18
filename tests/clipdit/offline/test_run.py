"""The offline job: nothing lost, nothing doubled, whatever happens to it on the way."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from job_pictures import contents, draw, ledger
from PIL import Image

from clipdit.fake_backend import FakeBackend
from clipdit.images import encode_image, read_image
from clipdit.offline import JobFolder, JobSettings, item_seed, run_job, verify_job
from clipdit.translator import Translator


def count_encoded(calls: list) -> int:
    return sum(batch for call, batch in calls if call == "encode")


class TestFolder:
    def test_every_input_becomes_one_output_at_its_own_size_and_place(self, translator, inputs, tmp_path):
        summary = run_job(translator, inputs, tmp_path / "out")
        assert (summary.total, summary.written, summary.quarantined) == (20, 20, 0)
        for source in inputs.rglob("*.*"):
            output = (tmp_path / "out" / source.relative_to(inputs)).with_suffix(".png")
            assert read_image(output).shape == read_image(source).shape
        assert verify_job(tmp_path / "out").ok
        assert {row["id"] for row in ledger(tmp_path / "out")} == {p.relative_to(inputs).as_posix() for p in inputs.rglob("*.*")}

    def test_an_image_of_a_job_is_the_image_its_seed_gives_alone(self, translator, inputs, tmp_path):
        run_job(translator, inputs, tmp_path / "out", JobSettings(seed=7))
        for row in ledger(tmp_path / "out"):
            assert row["seed"] == item_seed(7, row["id"])
            alone = translator.translate_image(read_image(row["input"]), seed=row["seed"])
            assert (tmp_path / "out" / row["output"]).read_bytes() == encode_image(alone, "PNG")

    def test_neither_batch_size_nor_threads_change_a_byte(self, translator, inputs, tmp_path):
        run_job(translator, inputs, tmp_path / "a", batch_size=1, workers=1)
        run_job(translator, inputs, tmp_path / "b", batch_size=7, workers=5)
        assert contents(tmp_path / "a") == contents(tmp_path / "b")

    def test_other_inputs_do_not_change_an_image(self, translator, inputs, tmp_path):
        run_job(translator, inputs, tmp_path / "a")
        for source in sorted(inputs.rglob("*.*"))[::2]:
            source.unlink()
        run_job(translator, inputs, tmp_path / "b")
        before, after = contents(tmp_path / "a"), contents(tmp_path / "b")
        assert len(after) == 10 and after.items() <= before.items()

    def test_bad_inputs_are_quarantined_with_their_reason_and_the_others_go_on(self, translator, inputs, tmp_path):
        (inputs / "text.png").write_text("no picture")
        (inputs / "empty.jpg").touch()
        (inputs / "cut.png").write_bytes((inputs / "00.png").read_bytes()[:-60])
        (inputs / "gone.webp").symlink_to("nowhere")
        summary = run_job(translator, inputs, tmp_path / "out")
        assert (summary.written, summary.quarantined) == (20, 4)
        verdict = verify_job(tmp_path / "out")
        assert verdict.ok and verdict.written == 20
        reasons = dict(verdict.quarantined)
        assert "text" in reasons["text.png"] and "empty" in reasons["empty.jpg"] and "nowhere" in reasons["gone.webp"]
        assert reasons["cut.png"] and not (tmp_path / "out" / "cut.png").exists()

    def test_every_odd_file_is_translated_or_named_with_its_reason(self, translator, odd_images, tmp_path):
        summary = run_job(translator, odd_images.folder, tmp_path / "out", JobSettings(keep_suffix=True))
        rows = {row["id"]: row for row in ledger(tmp_path / "out")}
        assert len(odd_images.expected) >= 40 and summary.total == len(rows)
        passed_over = {line.split(":")[0] for line in json.loads((tmp_path / "out" / "job.json").read_text())["ignored"]}
        assert rows.keys() | passed_over == odd_images.expected.keys() and not rows.keys() & passed_over
        for name, expected in odd_images.expected.items():
            if expected == "ok" and len(name) + len(".png") > 255:  # what the file system takes
                expected = "name too long"
            if expected == "ok":
                assert rows[name]["status"] == "written", rows[name]["reason"]
                written = read_image(tmp_path / "out" / rows[name]["output"])
                assert written.shape == read_image(odd_images.folder / name).shape
            elif name in rows:
                assert rows[name]["status"] == "quarantined" and expected in rows[name]["reason"]
                assert "\n" not in rows[name]["reason"] and len(rows[name]["reason"]) < 300
        assert verify_job(tmp_path / "out").ok

    def test_files_that_are_no_images_are_passed_over_by_name(self, translator, inputs, tmp_path):
        (inputs / "notes.txt").write_text("hello")
        (inputs / ".hidden.png").touch()
        (inputs / "no_suffix").write_bytes((inputs / "00.png").read_bytes())
        (inputs / "link").symlink_to("sub")
        summary = run_job(translator, inputs, tmp_path / "out")
        assert (summary.total, summary.written, summary.ignored) == (21, 21, 2)
        assert (tmp_path / "out" / "no_suffix.png").exists()
        ignored = json.loads((tmp_path / "out" / "job.json").read_text())["ignored"]
        assert [line.split(":")[0] for line in ignored] == ["notes.txt", "link"]

    def test_names_of_any_bytes_and_any_length_are_accounted_for(self, translator, inputs, tmp_path):
        image = (inputs / "00.png").read_bytes()
        odd = [os.fsdecode(b"n\xff\xfe.png"), "new\nline.png", "ü 😀.png", "x" * 251 + ".png", "a.b.c.png"]
        for name in odd:
            (inputs / name).write_bytes(image)
        summary = run_job(translator, inputs, tmp_path / "out", JobSettings(format="webp"))
        assert (summary.written, summary.quarantined) == (24, 1)  # 251 characters and .webp are one too many for the file system
        verdict = verify_job(tmp_path / "out")
        assert verdict.ok and "name too long" in verdict.quarantined[0][1]
        assert (tmp_path / "out" / os.fsdecode(b"n\xff\xfe.webp")).exists() and (tmp_path / "out" / "a.b.c.webp").exists()

    def test_every_image_may_keep_its_own_size_in_the_model(self, inputs, tmp_path):
        calls = []
        translator = Translator(FakeBackend(native_size=(32, 32), on_call=lambda *call: calls.append(call)))
        run_job(translator, inputs, tmp_path / "out", JobSettings(size="own"), batch_size=4)
        assert verify_job(tmp_path / "out").written == 20
        assert count_encoded(calls) == 20
        with_net_of_8 = read_image(tmp_path / "out" / "00.png")  # 20 x 100: a multiple of 4, so its blocks are whole
        assert with_net_of_8.shape == (3, 20, 100) and torch.equal(with_net_of_8[:, ::4], with_net_of_8[:, 1::4])

    def test_output_inside_the_input_folder_is_not_read_as_input(self, translator, inputs):
        out = inputs / "translated"
        run_job(translator, inputs, out)
        assert run_job(translator, inputs, out, resume=True).total == 20

    def test_progress_counts_up_to_the_total(self, translator, inputs, tmp_path):
        seen = []
        run_job(translator, inputs, tmp_path / "out", batch_size=6, on_progress=seen.append)
        assert [p.finished for p in seen] == sorted(p.finished for p in seen)
        assert (seen[0].finished, seen[-1].finished, seen[-1].total) == (0, 20, 20)


SLOW_JOB = """
import sys
from pathlib import Path
from clipdit.fake_backend import FakeBackend
from clipdit.offline import run_job
from clipdit.translator import Translator
source, output, delay_s = sys.argv[1:]
backend = FakeBackend(native_size=(32, 32), delay_s=float(delay_s))
run_job(Translator(backend), Path(source), Path(output), batch_size=2, resume=True)
"""


def start_slow_job(source: Path, output: Path, delay_s: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_JOB, str(source), str(output), str(delay_s)], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def wait_for_lines(output: Path, count: int, process: subprocess.Popen) -> None:
    deadline_s = time.monotonic() + 60
    while not (output / "ledger.jsonl").exists() or (output / "ledger.jsonl").read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < deadline_s, "the job ended before it could be killed"
        time.sleep(0.002)


class TestInterrupted:
    def test_killed_twice_and_resumed_equals_an_unbroken_run(self, translator, inputs, tmp_path):
        (inputs / "bad.png").write_text("bad")
        out = tmp_path / "out"
        for lines in (4, 12):
            process = start_slow_job(inputs, out, 0.01)
            wait_for_lines(out, lines, process)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert not verify_job(out).ok
        done = len(ledger(out))
        summary = run_job(translator, inputs, out, resume=True)
        assert done - 1 <= summary.kept <= done and summary.kept + summary.written == 20  # the bad one is tried again
        run_job(translator, inputs, tmp_path / "unbroken")
        assert contents(out) == contents(tmp_path / "unbroken") and len(contents(out)) == 20
        assert verify_job(out).ok
        assert sorted(row["id"] for row in ledger(out)) == sorted(row["id"] for row in ledger(tmp_path / "unbroken"))
        assert [p.name for p in (out / ".clipdit").iterdir()] == ["lock"]
        assert not list(out.rglob("*.tmp")) + list(out.rglob("*.part"))

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_ten_thousand_files_killed_twenty_times_equal_an_unbroken_run(self, translator, tmp_path):
        """kill -9 at random moments: reading, translating, between an image and its line in the ledger, starting."""
        rng, source, out = random.Random(0), tmp_path / "in", tmp_path / "out"
        source.mkdir()
        for i in range(10_000):
            bad = i % 100 == 7
            path = source / f"{i:05}.png"
            path.write_bytes(rng.randbytes(40)) if bad else Image.frombytes("RGB", (8, 8), rng.randbytes(192)).save(path)
        killed = 0
        for lines in sorted(rng.sample(range(1, 9_800), 20)):
            process = start_slow_job(source, out, 0)
            wait_for_lines(out, lines, process)
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        assert killed == 20
        summary = run_job(translator, source, out, resume=True)
        assert summary.kept + summary.written == 9_900 and summary.quarantined == 100
        verdict = verify_job(out)
        assert verdict.ok and verdict.written == 9_900
        ids = [row["id"] for row in ledger(out)]
        assert len(set(ids)) == len(ids) == 10_000
        run_job(translator, source, tmp_path / "unbroken")
        assert contents(out) == contents(tmp_path / "unbroken")

    def test_a_second_process_is_kept_out(self, translator, inputs, tmp_path):
        process = start_slow_job(inputs, tmp_path / "out", 0.2)
        wait_for_lines(tmp_path / "out", 1, process)
        try:
            with pytest.raises(ValueError, match="another process is writing"):
                run_job(translator, inputs, tmp_path / "out", resume=True)
        finally:
            process.kill()
            process.wait()

    def test_interrupted_job_goes_on_where_it_was(self, inputs, tmp_path):
        calls = []

        def on_call(call, batch):
            calls.append((call, batch))
            if len(calls) == 20:
                raise KeyboardInterrupt

        backend = FakeBackend(native_size=(32, 32), on_call=on_call)
        with pytest.raises(KeyboardInterrupt):
            run_job(Translator(backend), inputs, tmp_path / "out", batch_size=4)
        done = len(ledger(tmp_path / "out"))
        assert 0 < done < 20
        before = count_encoded(calls)
        summary = run_job(Translator(backend), inputs, tmp_path / "out", batch_size=4, resume=True)
        assert (summary.kept, summary.written) == (done, 20 - done)
        assert count_encoded(calls) - before == 20 - done
        assert verify_job(tmp_path / "out").ok

    def test_a_ledger_line_cut_short_costs_that_line_only(self, translator, inputs, tmp_path):
        run_job(translator, inputs, tmp_path / "out")
        path = tmp_path / "out" / "ledger.jsonl"
        path.write_bytes(path.read_bytes()[:-30])
        assert verify_job(tmp_path / "out").problems[0] == "ledger.jsonl cannot be read after line 19"
        summary = run_job(translator, inputs, tmp_path / "out", resume=True)
        assert (summary.kept, summary.written) == (19, 1)
        assert verify_job(tmp_path / "out").ok

    def test_full_disk_stops_in_one_line_and_goes_on_later(self, translator, inputs, tmp_path, monkeypatch):
        write, count = JobFolder.write_file, 0

        def fills_up(self, path, data, **options):
            nonlocal count
            count += path.suffix == ".png"
            if count > 9:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return write(self, path, data, **options)

        monkeypatch.setattr(JobFolder, "write_file", fills_up)
        with pytest.raises(ValueError, match=r"No space left on device; 9 of 20 inputs are finished.*--resume") as raised:
            run_job(translator, inputs, tmp_path / "out", batch_size=4)
        assert "\n" not in str(raised.value)
        monkeypatch.undo()
        assert len(ledger(tmp_path / "out")) == 9
        summary = run_job(translator, inputs, tmp_path / "out", resume=True)
        assert (summary.kept, summary.written) == (9, 11) and verify_job(tmp_path / "out").ok

    def test_ledger_takes_all_lines_of_a_batch_or_none(self, translator, inputs, tmp_path, monkeypatch):
        sync, count = os.fsync, 0

        def fails_once(descriptor):
            nonlocal count
            count += 1
            if count == 5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return sync(descriptor)

        monkeypatch.setattr(os, "fsync", fails_once)
        with pytest.raises(ValueError, match="No space left"):
            run_job(translator, inputs, tmp_path / "out", batch_size=4)
        assert len(ledger(tmp_path / "out")) % 4 == 0
        assert run_job(translator, inputs, tmp_path / "out", resume=True).total == 20
        assert verify_job(tmp_path / "out").ok


class TestResume:
    def test_intact_outputs_are_not_made_again_and_others_are(self, inputs, tmp_path):
        calls = []
        translator = Translator(FakeBackend(native_size=(32, 32), on_call=lambda *call: calls.append(call)))
        out = tmp_path / "out"
        (inputs / "late.png").write_text("not yet an image")
        run_job(translator, inputs, out)
        before = contents(out)
        (out / "00.png").unlink()
        (out / "03.png").write_bytes(b"altered")
        draw(inputs / "late.png")
        draw(inputs / "new.png")
        times = {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
        calls.clear()
        summary = run_job(translator, inputs, out, resume=True)
        assert (summary.total, summary.kept, summary.written, summary.quarantined) == (22, 18, 4, 0)
        assert count_encoded(calls) == 4
        after = contents(out)
        assert after.keys() - before.keys() == {"late.png", "new.png"} and before.items() <= after.items()
        assert sum(p.stat().st_mtime_ns == t for p, t in times.items()) == 18
        assert verify_job(out).ok

    def test_without_resume_a_job_is_left_alone(self, translator, inputs, tmp_path):
        run_job(translator, inputs, tmp_path / "out")
        with pytest.raises(ValueError, match=r"holds a job already\. Add --resume"):
            run_job(translator, inputs, tmp_path / "out")

    def test_resume_of_nothing_starts(self, translator, inputs, tmp_path):
        assert run_job(translator, inputs, tmp_path / "out", resume=True).written == 20

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            ({"seed": 1}, "seed = 0; now it is 1"),
            ({"steps": 9}, "steps = 4; now it is 9"),
            ({"guidance": 2.0}, "guidance = 1.0; now it is 2.0"),
            ({"solver": "heun"}, "solver = euler; now it is heun"),
            ({"fit": "crop"}, "fit = pad; now it is crop"),
            ({"size": (64, 64)}, r"size = \[32, 32\]; now it is \[64, 64\]"),
            ({"format": "webp"}, "format = png; now it is webp"),
            ({"keep_suffix": True}, "keep_suffix = False; now it is True"),
        ],
    )
    def test_other_settings_are_refused_by_name(self, translator, inputs, tmp_path, change, name):
        run_job(translator, inputs, tmp_path / "out")
        before = (tmp_path / "out" / "ledger.jsonl").read_bytes()
        with pytest.raises(ValueError, match=f"holds a job with {name}"):
            run_job(translator, inputs, tmp_path / "out", JobSettings(**change), resume=True)
        assert (tmp_path / "out" / "ledger.jsonl").read_bytes() == before

    def test_another_model_or_another_input_folder_is_refused(self, translator, inputs, tmp_path):
        run_job(translator, inputs, tmp_path / "out")
        other = Translator(FakeBackend(native_size=(32, 32), downscale=8))
        with pytest.raises(ValueError, match="holds a job with model = "):
            run_job(other, inputs, tmp_path / "out", resume=True)
        draw(tmp_path / "in2" / "00.png")
        with pytest.raises(ValueError, match="holds a job with input = "):
            run_job(translator, tmp_path / "in2", tmp_path / "out", resume=True)

    def test_an_edited_manifest_is_refused_for_what_it_contradicts(self, translator, inputs, tmp_path):
        manifest = tmp_path / "m.csv"
        manifest.write_text("source,seed\nin/00.png,1\n")
        run_job(translator, manifest, tmp_path / "out")
        manifest.write_text("source,seed\nin/00.png,2\n")
        with pytest.raises(ValueError, match=r"in/00.png has seed 1; now it is 2"):
            run_job(translator, manifest, tmp_path / "out", resume=True)


class TestMemory:
    def test_out_of_memory_halves_the_batch_and_changes_no_image(self, translator, inputs, tmp_path):
        sizes = []

        def small(call, batch):
            if call == "encode":
                sizes.append(batch)
            if batch > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")

        summary = run_job(Translator(FakeBackend(native_size=(32, 32), on_call=small)), inputs, tmp_path / "a", batch_size=16)
        assert summary.batch_size == 2 and (summary.written, summary.quarantined) == (20, 0)
        assert sizes[:4] == [16, 8, 4, 2] and max(sizes[4:]) == 2
        run_job(translator, inputs, tmp_path / "b")
        assert contents(tmp_path / "a") == contents(tmp_path / "b")

    def test_an_image_too_large_alone_is_quarantined(self, inputs, tmp_path):
        class Small(FakeBackend):
            def encode(self, source_u8):
                if source_u8.shape[-1] > 90:
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
                return super().encode(source_u8)

        summary = run_job(Translator(Small()), inputs, tmp_path / "out", JobSettings(size="own"))
        wide = [p for p in inputs.rglob("*.*") if read_image(p).shape[-1] > 88]  # brought up to a multiple of 4
        assert (summary.written, summary.quarantined) == (20 - len(wide), len(wide)) and wide
        assert all("not enough memory for one image of " in reason for _, reason in verify_job(tmp_path / "out").quarantined)

    def test_other_errors_of_the_backend_are_not_hidden(self, inputs, tmp_path):
        def broken(call, batch):
            raise RuntimeError("device-side assert")

        with pytest.raises(RuntimeError, match="device-side assert"):
            run_job(Translator(FakeBackend(on_call=broken)), inputs, tmp_path / "out")
        assert len(ledger(tmp_path / "out")) == 0 if (tmp_path / "out" / "ledger.jsonl").exists() else True
