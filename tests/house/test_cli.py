"""The command line is a promise: names, options, exit codes, and one line instead of a traceback."""

import contextlib
import importlib.metadata
import itertools
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from clipdit import cli

CLIPDIT = Path(sys.executable).with_name("clipdit")


def spellings(name: str) -> list[list[str]]:
    """The words of every verb under one entry point: [["data", "emoji"], ["data", "check"]]."""
    return [[name, *filter(None, [sub])] for sub in cli.load_verb(cli.installed_verbs(), name)]


def fake(source: str = "", *, steps: int = 4, how: Literal["pad", "crop"] = "pad") -> int:
    """Do what the source says.

    Args:
        source: the name of an error, or an exit code.
        steps: how often.
        how: how.
    """
    match source:
        case "value":
            raise ValueError("image is 250 x 250;\n  wanted 256 x 256")
        case "file":
            return len(Path("no-such-file").read_bytes())
        case "interrupt":
            raise KeyboardInterrupt
        case "fault":
            raise RuntimeError("ours")
    return int(source or steps)


def plain_twin(*, two: int = 2) -> int:
    """Return what is given."""
    return two


def run(*words: str) -> int:
    return cli.main(words, verbs={"fake": lambda: fake, "twin": lambda: {"one": fake, "": plain_twin}})


def test_help_answers_within_two_cpu_seconds_and_without_torch():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import sys; from clipdit.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


def test_help_lists_every_verb_with_its_summary(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--help"]) == cli.DONE
    lines = capsys.readouterr().out.splitlines()
    for words in itertools.chain.from_iterable(map(spellings, cli.names_of(cli.installed_verbs()))):
        (line,) = [line for line in lines if line.startswith(f"  {' '.join(words)}  ")]
        assert len(line.split()) > len(words) + 2


def test_every_verb_of_the_promise_is_there():
    names = {" ".join(words) for name in cli.names_of(cli.installed_verbs()) for words in spellings(name)}
    assert names >= {
        "data emoji", "data check", "train", "evaluate", "translate", "verify", "demo", "export", "inspect", "doctor", "serve",
        "bench", "bench compare", "bench training", "bench kernels", "bench sampling", "bench serve",
    }  # fmt: skip


@pytest.mark.parametrize("name", cli.names_of(cli.installed_verbs()))
def test_every_verb_has_help_and_a_json_option(name: str, capsys: pytest.CaptureFixture[str]):
    for words in spellings(name):
        assert cli.main([*words, "--help"]) == cli.DONE
        text = capsys.readouterr().out
        assert f"usage: clipdit {' '.join(words)}" in text
        assert "--json" in text


@pytest.mark.parametrize("name", cli.names_of(cli.installed_verbs()))
def test_an_unknown_option_of_any_verb_is_one_line_and_exit_code_2(name: str, capfd: pytest.CaptureFixture[str]):
    for words in spellings(name):
        assert cli.main([*words, "--no-such-option", "1"]) == cli.WRONG_INPUT
        output = capfd.readouterr()
        assert output.out == ""
        (line,) = output.err.splitlines()
        assert line.startswith("clipdit: ")
        assert "--no-such-option" in line or f"`clipdit {name}" in line


@pytest.mark.parametrize(
    "words, wanted",
    [
        ([], "clipdit: no verb given; see `clipdit --help`"),
        (["fack"], "clipdit: fack is no verb; there are fake, twin"),
        (["--fack"], "clipdit: --fack is no verb; there are fake, twin"),
        (["fake", "--stps", "4"], "clipdit: Unrecognized options: --stps, 4 (perhaps --steps INT). See `clipdit fake --help`"),
        (
            ["fake", "--steps", "x"],
            "clipdit: Error parsing --steps: invalid literal for int() with base 10: 'x'. See `clipdit fake --help`",
        ),
        (["fake", "--source", "value"], "clipdit: image is 250 x 250; wanted 256 x 256"),
        (["fake", "--source", "file"], "clipdit: No such file or directory: no-such-file"),
    ],
)
def test_what_the_user_did_wrong_is_said_in_one_line(words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]):
    assert run(*words) == cli.WRONG_INPUT
    output = capsys.readouterr()
    assert output.err == wanted + "\n"
    assert output.out == ""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_option_errors_are_one_line_in_any_encoding(encoding: str):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([CLIPDIT, "verify", "a", "b", "--jsn"], env=environment, capture_output=True, text=True)
    assert done.returncode == cli.WRONG_INPUT
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("clipdit: Unrecognized options: ")
    assert line.endswith(" See `clipdit verify --help`")


def test_exit_codes_pass_through(capsys: pytest.CaptureFixture[str]):
    assert run("fake", "--source", "0") == 0
    assert run("fake", "--source", "3") == cli.QUARANTINED
    assert run("fake", "--source", "interrupt") == cli.INTERRUPTED
    assert capsys.readouterr().err == "clipdit: interrupted\n"


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="ours"):
        run("fake", "--source", "fault")


def test_traceback_option_shows_where_an_error_came_from(capsys: pytest.CaptureFixture[str]):
    assert run("--traceback", "fake", "--source", "value") == cli.WRONG_INPUT
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "clipdit: image is 250 x 250; wanted 256 x 256"


def test_nested_verbs_and_the_one_without_a_name(capsys: pytest.CaptureFixture[str]):
    assert run("twin", "one", "--source", "3") == 3
    assert run("twin", "--two", "4") == 4


def test_an_entry_point_with_a_dot_adds_to_the_verb_before_it(capsys: pytest.CaptureFixture[str]):
    verbs = {"twin": lambda: {"one": fake, "": plain_twin}, "twin.two": lambda: fake}
    assert cli.main(["twin", "two", "--source", "3"], verbs=verbs) == 3
    assert cli.main(["twin", "--two", "4"], verbs=verbs) == 4
    assert cli.main(["--help"], verbs=verbs) == cli.DONE
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  twin two  ")]
    assert line.endswith("  Do what the source says.")
    assert cli.main(["twin.two"], verbs=verbs) == cli.WRONG_INPUT
    assert capsys.readouterr().err == "clipdit: twin.two is no verb; there are twin\n"


def test_a_verb_may_read_its_own_arguments(capsys: pytest.CaptureFixture[str]):
    @cli.takes_argv
    def own(argv: list[str]) -> int:
        print(argv)
        return 4

    assert cli.main(["own", "a", "--b.c", "1"], verbs={"own": lambda: own}) == 4
    assert capsys.readouterr().out == "['a', '--b.c', '1']\n"


def test_a_verb_whose_package_is_missing_says_so_and_spares_the_others(capsys: pytest.CaptureFixture[str]):
    def missing():
        raise ModuleNotFoundError(name="onnx")

    verbs = {"export": missing, "fake": lambda: fake}
    assert cli.main(["export"], verbs=verbs) == cli.WRONG_INPUT
    assert capsys.readouterr().err == "clipdit: `export` needs the Python package `onnx`, which is not installed\n"
    assert cli.main(["--help"], verbs=verbs) == cli.DONE
    help_text = capsys.readouterr().out
    assert "Do what the source says." in help_text
    assert "needs the Python package `onnx`" in help_text


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == cli.DONE
    assert capsys.readouterr().out == f"clipdit {importlib.metadata.version('clipdit')}\n"


def test_a_reader_who_leaves_early_gets_no_complaint():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run([CLIPDIT, "--help"], stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (cli.BROKEN_PIPE, "")


def test_control_c_ends_a_real_process_with_130():
    code = (
        "import signal, sys, time; from clipdit.cli import main\n"
        # a shell's job in the background ignores Ctrl-C, and so would all that it starts, this test among them
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait() -> int:\n    print('ready', flush=True); time.sleep(60)\n    return 0\n"
        "sys.exit(main(['wait'], verbs={'wait': lambda: wait}))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        with contextlib.closing(process.stdout):
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stderr.read() == "clipdit: interrupted\n"
        assert process.wait(10) == cli.INTERRUPTED


OUTLIVED = """
import atexit, sys, threading, time
from clipdit import cli
thread = threading.Thread(target=time.sleep, args=(60,), daemon=True, name=sys.argv.pop())
thread.start()
atexit.register(print, "torn down")
cli.script()
"""


@pytest.mark.parametrize(("name", "said"), [("clipdit-model", ""), ("another", "torn down\n")])
@pytest.mark.parametrize(("words", "code"), [(["--version"], cli.DONE), (["nothing"], cli.WRONG_INPUT)])
def test_nothing_is_torn_down_under_a_model_that_still_computes(name: str, said: str, words: list[str], code: int):
    done = subprocess.run([sys.executable, "-P", "-c", OUTLIVED, *words, name], capture_output=True, text=True, check=False)
    version = f"clipdit {importlib.metadata.version('clipdit')}\n" if code == cli.DONE else ""
    assert (done.returncode, done.stdout) == (code, version + said)
    assert done.stderr.startswith("clipdit: nothing is no verb") or code == cli.DONE
