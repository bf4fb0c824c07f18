"""`clipdit translate` and `clipdit verify` as users type them."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipdit.cli import main
from clipdit.fake_backend import FakeBackend
from clipdit.images import encode_image, read_image
from clipdit.translator import Translator


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Nine images and nothing else, in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    Path("in/sub").mkdir(parents=True)
    for i in range(9):
        image = Image.new("RGB", (30 + 5 * i, 40), (25 * i, 100, 255 - 25 * i))
        image.paste((255, 255, 255), (4, 4, 20, 20))
        image.save(f"in/{'sub/' * (i % 2)}{i}.png")
    return tmp_path


def run(*arguments: str) -> int:
    return main(["translate", *arguments, "--backend", "fake"])


def test_a_file_becomes_a_file(folder, capsys):
    assert run("in/0.png", "new/out.png", "--seed", "3", "--steps", "2") == 0
    expected = Translator(FakeBackend()).translate_image(read_image("in/0.png"), seed=3, steps=2)
    assert torch.equal(read_image("new/out.png"), expected)
    assert capsys.readouterr().out == "new/out.png\n"


def test_the_name_of_the_output_says_its_format(folder):
    assert run("in/0.png", "a.webp") == run("in/0.png", "a.jpg") == run("in/0.png", "into", "--format", "jpeg") == 0
    assert [Image.open(name).format for name in ("a.webp", "a.jpg", "into/0.jpeg")] == ["WEBP", "JPEG", "JPEG"]


def test_standard_input_and_output(folder, monkeypatch, capsysbinary):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("in/0.png").read_bytes())))
    assert run("-", "-", "--seed", "5") == 0
    expected = Translator(FakeBackend()).translate_image(read_image("in/0.png"), seed=5)
    assert capsysbinary.readouterr().out == encode_image(expected, "PNG")


def test_a_folder_becomes_a_folder_and_verifies(folder, capsys):
    assert run("in", "out", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["output"], summary["total"], summary["written"], summary["quarantined"]) == ("out", 9, 9, 0)
    assert sorted(p.name for p in Path("out/sub").iterdir()) == ["1.png", "3.png", "5.png", "7.png"]
    assert main(["verify", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "total": 9, "written": 9, "quarantined": [], "problems": []}


def test_an_image_of_a_folder_is_made_alone_with_the_seed_in_the_ledger(folder):
    assert run("in", "out", "--seed", "12") == 0
    row = json.loads(Path("out/ledger.jsonl").read_text().splitlines()[4])
    assert run(row["input"], "alone.png", "--seed", str(row["seed"])) == 0
    assert Path("alone.png").read_bytes() == Path("out", row["output"]).read_bytes()


def test_quarantine_is_exit_code_3_and_accounted_for(folder, capsys):
    Path("in/bad.png").write_text("no picture")
    assert run("in", "out") == 3
    captured = capsys.readouterr()
    assert "9 written, 1 quarantined" in captured.out and "bad.png: is text, not an image" in captured.err
    assert main(["verify", "out"]) == 0
    assert "quarantined  bad.png: is text, not an image" in capsys.readouterr().out


def test_a_damaged_job_is_exit_code_4(folder, capsys):
    assert run("in", "out") == 0
    Path("out/0.png").unlink()
    assert main(["verify", "out"]) == 4
    assert "problem      0.png: 0.png is gone" in capsys.readouterr().out
    assert run("in", "out", "--resume") == 0
    assert main(["verify", "out"]) == 0


def test_a_manifest_is_many_images(folder):
    Path("list.csv").write_text("source,output\nin/0.png,zero.webp\nin/2.png,\n")
    assert run("list.csv", "out") == 0
    assert Path("out/zero.webp").exists() and Path("out/in/2.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png", "x.png"], "nowhere.png does not exist"),
        (["in/0.png", "x.gif"], "x.gif ends in .gif; wanted one of .png"),
        (["in/0.png", "x.png", "--format", "webp"], "--format is webp, but x.png ends in .png"),
        (["in/0.png", "in/0.png"], "is the input"),
        (["in/0.png", "x.png", "--resume"], "--resume is for folders"),
        (["in/0.png", "-", "--json"], "standard output cannot take both"),
        (["in/0.png", "x.png", "--size", "big"], '--size is "big"; wanted HEIGHTxWIDTH'),
        (["in/0.png", "x.png", "--size", "30x30"], "multiples of 4"),
        (["in/0.png", "x.png", "--steps", "0"], "steps is 0"),
        (["in/0.png", "x.png", "--solver", "ddim"], "a flow matching model takes euler"),
        (["in/0.png", "x.png", "--seed", "-1"], "seed is -1"),
        (["text.png", "x.png"], "is text, not an image"),
        (["in", "-"], "in is many images"),
        (["in", "in"], "not empty"),
        (["in", "out", "--batch-size", "0"], "batch size is 0"),
        (["in", "text.png"], "text.png is a file"),
        (["in", "text.png/out"], "Not a directory"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(folder, capsys, arguments, message):
    Path("text.png").write_text("text")
    before = sorted(folder.rglob("*"))
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("clipdit: ")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in captured.err and captured.out == ""
    assert sorted(folder.rglob("*")) == before


def test_no_job_to_verify_is_exit_code_2(folder, capsys):
    assert main(["verify", "in"]) == 2
    assert "holds no job" in capsys.readouterr().err


def test_help_names_every_promised_option(capsys):
    assert main(["translate", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--model", "--backend", "--steps", "--seed", "--batch-size", "--resume", "--guidance", "--solver", "--json"):
        assert option in text
    assert "INPUT" in text and "OUTPUT" in text


def test_progress_is_plain_lines_where_there_is_no_terminal(folder, monkeypatch, caplog):
    monkeypatch.setattr("clipdit.commands.translate.PROGRESS_INTERVAL_S", 0.0)
    with caplog.at_level(logging.INFO, logger="clipdit"):
        assert run("in", "out", "--batch-size", "3") == 0
    lines = [record.getMessage() for record in caplog.records if " of 9, " in record.getMessage()]
    assert lines[0].startswith("0 of 9") and lines[-1].startswith("9 of 9, 0 quarantined")


def test_interrupt_is_exit_code_130_and_says_how_to_go_on(folder, monkeypatch, capsys):
    calls = []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return encode(self, *arguments)

    encode = FakeBackend.encode
    monkeypatch.setattr(FakeBackend, "encode", interrupted)
    assert run("in", "out", "--batch-size", "3") == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.undo()
    os.chdir(folder)
    assert run("in", "out", "--resume") == 0 and main(["verify", "out"]) == 0


def test_killed_command_goes_on_with_resume_and_ends_as_if_never_killed(folder):
    for i in range(100, 400):
        Image.new("RGB", (64, 64), (i % 256, 50, 50)).save(f"in/{i}.png")
    words = ["translate", "in", "out", "--backend", "fake", "--batch-size", "1"]
    script = f"import sys; from clipdit.cli import main; sys.exit(main({words!r}))"
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline_s = time.monotonic() + 120
    while not Path("out/ledger.jsonl").exists() or Path("out/ledger.jsonl").read_bytes().count(b"\n") < 20:
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 20 <= len(Path("out/ledger.jsonl").read_bytes().splitlines()) < 309
    assert main(["verify", "out"]) == 4
    assert run("in", "out", "--resume") == 0 and run("in", "unbroken") == 0
    assert main(["verify", "out"]) == 0
    names = sorted(p.relative_to("unbroken") for p in Path("unbroken").rglob("*.png"))
    assert names == sorted(p.relative_to("out") for p in Path("out").rglob("*.png")) and len(names) == 309
    assert all(Path("out", name).read_bytes() == Path("unbroken", name).read_bytes() for name in names)
