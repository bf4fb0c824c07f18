"""`clipdit bench kernels` and `clipdit bench sampling`, where there is no GPU and with numbers that are kept."""

import json

import pytest
import torch

from clipdit import cli
from clipdit_kernels import launch
from clipdit_kernels.benchmark import ledger, report

NO_GPU = "clipdit: there is nothing to measure here: "


def spread(median: float) -> dict:
    return {"median": median, "low": 0.98 * median, "high": 1.02 * median, "p95": 1.02 * median, "count": 10}


def record(kind: str) -> dict:
    """As a GPU would have left it."""
    made = ledger.begin(kind, torch.device("cpu"), {}) | {
        "device": "NVIDIA H200",
        "ceilings": {"bytes_per_s": 4.2e12, "flop_per_s": {"bf16": 7.5e14, "int8": 1.4e15}, "node_us": 1.25},
    }
    shape = {"size": "XL", "tokens": 256, "images": 64, "dtype": "bfloat16"}
    if kind == "sampling":
        ways = {"eager": 60.0, "compile-graph": 50.0, "ours": 40.0}
        variants = {name: {"ms_per_step": spread(ms), "error": 0.01} for name, ms in ways.items()}
        made["entries"] = [shape | {"floor_ms_per_step": 30.0, "variants": variants, "left_out": {"ours-int8": "ValueError: no"}}]
        return made
    rivals = {"ours": 100.0, "eager": 300.0, "Inductor": 125.0}
    made["entries"] = [
        shape | {
            "operation": "gate_residual_norm_modulate", "bytes_moved": 302_000_000, "flops": 0, "factors": "bf16",
            "floor_us": 72.0, "left_out": {"theirs": "too wide"},
            "rivals": {name: {"us": spread(us), "error": 0.002} for name, us in rivals.items()},
        }
    ]  # fmt: skip
    return made


@pytest.fixture(params=["kernels", "sampling"])
def kind(request: pytest.FixtureRequest, tmp_path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(ledger, "KEPT", tmp_path / "kept")
    return request.param


def test_without_numbers_it_says_how_to_get_some(kind: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", kind]) == cli.DONE
    assert capsys.readouterr().out == f"no GPU has measured these kernels yet. On one: clipdit bench {kind} --out {kind}.json\n"
    assert cli.main(["bench", kind, "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out) is None


def test_numbers_that_are_kept_are_shown_with_their_hardware(kind: str, capsys: pytest.CaptureFixture[str]):
    made = record(kind)
    ledger.write(made, ledger.KEPT / f"{kind}.json")
    assert cli.main(["bench", kind]) == cli.DONE
    text = capsys.readouterr().out
    assert text.startswith(f"Measured on NVIDIA H200, {made['provenance']['date'][:10]}; torch ")
    assert "Copy 4.20 TB/s, 750 TFLOP/s bf16, 1400 TOP/s int8, 1.25 µs a node of a graph" in text and "Stale" not in text
    if kind == "kernels":
        (row,) = [line for line in text.splitlines() if line.startswith("| gate_residual")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells == [
            "gate_residual_norm_modulate", "XL", "256", "64", "100 (98 to 102)", "2.0e-03", "3.02 TB/s", "72%",
            "Inductor", "125 (122 to 128)", "2.0e-03", "1.25 times as fast",
        ]  # fmt: skip
        assert "left out 1 times: theirs: too wide" in text
    else:
        assert "| XL/2  | 256    | 64     | ours" in text and "1.50 times as fast" in text and "75%" in text
        assert "left out: ValueError: no" in text
    assert cli.main(["bench", kind, "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out) == made


def test_numbers_of_other_kernels_are_marked(kind: str, capsys: pytest.CaptureFixture[str]):
    ledger.write(record(kind) | {"source": "0" * 64}, ledger.KEPT / f"{kind}.json")
    assert cli.main(["bench", kind]) == cli.DONE
    assert "**Stale: the kernels have changed since.**" in capsys.readouterr().out


def test_a_gain_within_the_spread_is_none():
    (entry,) = record("kernels")["entries"]
    assert report.wins(entry) is True
    entry["rivals"]["Inductor"]["us"] = spread(90.0)
    assert report.wins(entry) is False
    entry["rivals"]["Inductor"]["us"] = spread(102.0)
    assert report.wins(entry) is None
    assert report.wins(entry | {"rivals": {"ours": entry["rivals"]["ours"]}}) is None


def test_a_plot_is_a_picture(kind: str):
    assert report.plot(record(kind)).startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_nothing_is_measured_and_nothing_written(
    kind: str, tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert cli.main(["bench", kind, "--out", str(tmp_path / "new.json")]) == cli.WRONG_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(NO_GPU + "TRITON_INTERPRET is set")
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    assert cli.main(["bench", kind, "--out", str(tmp_path / "new.json")]) == cli.WRONG_INPUT
    said = "fused kernels run on NVIDIA GPUs, not on cpu; without --out you see the last numbers"
    assert capsys.readouterr().err == f"{NO_GPU}{said}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words, said",
    [
        (["kernels", "--out", "a.txt"], "a.txt is no .json file; give a file for the numbers"),
        (
            ["kernels", "--out", "a.json", "--images", "0"],
            "the least of tokens, images and steps is 0, seconds is 0.5; wanted more than 0",
        ),
        (["kernels", "--out", "a.json", "--operations", "nrm"], "there is no nrm; there are branch-norm, norm, "),
        (["sampling", "--out", "a.json", "--sizes", "M"], "there is no M; there are Ti, S, B, L, XL"),
        (["sampling", "--out", "a.json", "--tokens", "200"], "tokens is 200; wanted a square, such as 256 or 1024"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", *words]) == cli.WRONG_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"clipdit: {said}")
