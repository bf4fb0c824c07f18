"""The README is run, not believed: its commands, its links, its length. Commands in docs/ must at least parse."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from clipdit import cli
from clipdit.backend import builtin_checkpoint

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The words of every line in a page's ```sh blocks, without comments; lines continued with a backslash are joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def clipdit_commands(page: Path) -> list[list[str]]:
    """What follows `clipdit` in those of them that call it, with or without a path."""
    return [words[1:] for words in commands(page) if Path(words[0]).name == "clipdit"]


def test_the_readme_holds_no_command_that_this_test_does_not_know():
    known = {"make", "source", "clipdit"}
    assert {words[0] for words in commands(README)} == known
    assert ["make", "demo"] in commands(README)
    assert ["make", "test"] in commands(README)
    assert [words[1:] for words in commands(README) if words[0] == "source"] == [[".venv/bin/activate"]]


@pytest.mark.parametrize("target", sorted({words[1] for page in PAGES for words in commands(page) if words[0] == "make"}))
def test_make_targets_exist(target: str):
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_two_commands_call_what_they_say():
    def recipe(target: str) -> str:
        return subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "clipdit demo --out demo" in recipe("demo")
    assert "pytest" in recipe("test")
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_clipdit_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)  # empty: nothing that is named exists
    verbs = cli.installed_verbs()
    for words in clipdit_commands(page):
        name, *rest = words
        nested = cli.load_verb(verbs, name)
        sub = rest.pop(0) if rest and rest[0] in nested else ""
        if getattr(nested[sub], "takes_argv", False):  # it reads its own arguments, so it is run; it may only miss its data
            assert cli.main(words) == cli.WRONG_INPUT
            complaint = capsys.readouterr().err
            assert "--help" not in complaint, f"{shlex.join(words)}: {complaint}"
        else:
            cli.parse(f"clipdit {name}", nested[sub], rest)


def test_the_commands_for_ones_own_drawings_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    samples = sorted((builtin_checkpoint().parent / "samples" / "source").glob("*.png"))
    monkeypatch.chdir(tmp_path)
    shutil.copy(samples[0], "drawing.png")
    Path("drawings").mkdir()
    for sample in samples[:2]:
        shutil.copy(sample, "drawings")
    ours = [words for words in clipdit_commands(README) if words[0] in ("translate", "verify") and "--model" not in words]
    assert len(ours) >= 3
    for words in ours:
        assert cli.main(words) == cli.DONE, capsys.readouterr().err
    assert Path("emoji.png").stat().st_size > 1000
    assert len(list(Path("emoji").glob("*.png"))) == 2


def test_links_and_pictures_of_the_readme_are_there():
    targets = re.findall(r"\]\(([^)]+)\)", README.read_text())
    assert any(target.endswith(".png") for target in targets)
    missing = [target for target in targets if "://" not in target and not (ROOT / target.split("#")[0]).exists()]
    assert missing == []


def test_the_readme_fits_on_a_screen():
    assert README.read_text().count("\n") <= 60
