"""What the processes of a cluster say, as the service passes it on."""

import json

import pytest

from clipdit_serve.cluster.local import CONTROLLER, Printer

LINE = json.dumps({"level": "INFO", "message": "POST /v1/translate 200"})


def told(*lines: str, pid: int | str = 7, is_err: bool = True, **more: str) -> dict:
    """As Ray tells it."""
    return {"ip": "127.0.0.1", "pid": pid, "is_err": is_err, "lines": list(lines), **more}


def test_json_lines_are_passed_on_and_others_become_json(capsys: pytest.CaptureFixture[str]):
    Printer(json=True)(told(LINE, "a fatal error", '["a list"]'))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == LINE
    assert [json.loads(line) for line in lines[1:]] == [
        {"level": "WARNING", "logger": "ray", "message": message, "pid": 7} for message in ("a fatal error", '["a list"]')
    ]


@pytest.mark.parametrize("cut", [1, 30, len(LINE) - 1])
def test_a_line_that_was_read_while_it_was_written_is_whole_again(cut: int, capsys: pytest.CaptureFixture[str]):
    printer = Printer(json=True)
    printer(told(LINE, LINE[:cut]))
    printer(told(LINE, pid=8))  # of another process, in between
    printer(told(LINE, is_err=False))  # and of its other stream
    printer(told(LINE[cut:], LINE))
    printer.close()
    assert capsys.readouterr().err.splitlines() == [LINE] * 5


def test_a_line_whose_end_never_comes_is_told_as_it_is(capsys: pytest.CaptureFixture[str]):
    printer = Printer(json=True)
    printer(told(LINE[:30]))
    printer(told(LINE))  # no end of that one
    printer(told(LINE[:40]))
    printer.close()
    printer.close()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == [LINE[:30], "POST /v1/translate 200", LINE[:40]]


def test_lines_that_are_to_be_read_by_people_stay_as_they_are(capsys: pytest.CaptureFixture[str]):
    Printer(json=False)(told("{a brace", "and words"))
    assert capsys.readouterr().err == "{a brace\nand words\n"


def test_the_autoscaler_and_the_controller_are_not_passed_on(capsys: pytest.CaptureFixture[str]):
    for json_too in (True, False):
        Printer(json_too)(told("nothing to do", pid="autoscaler"))
        Printer(json_too)(told("a replica ended", actor_name=CONTROLLER))
    assert capsys.readouterr().err == ""
