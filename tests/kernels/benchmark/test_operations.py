"""A whole measurement on a CPU: what it holds, what it leaves out, and that it goes on where it was."""

import json
from dataclasses import replace

import pytest
import torch

from clipdit_kernels.benchmark import ledger, peers
from clipdit_kernels.benchmark.cases import OPERATIONS, OURS, Case, Rival, Shape
from clipdit_kernels.benchmark.operations import measure

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "inductor", lambda operation, **options: operation)
    monkeypatch.setattr("clipdit_kernels.benchmark.timing.COLD", 1)  # one set of inputs
    monkeypatch.setattr("clipdit_kernels.benchmark.timing.AT_LEAST", 1)


def norm(tokens: int = 4) -> Case:
    return OPERATIONS["norm"](Shape(size="Ti", tokens=tokens, images=1), torch.float32)


def with_rival(case: Case, name: str, call) -> Case:
    return replace(case, rivals=case.rivals | {name: Rival(call=call)})


def run(*cases: Case, out=None, **options) -> ledger.Record:
    return measure(cases, CPU, out=out, seconds=0.01, side=64, **options)


def test_a_record_holds_times_errors_and_where_they_come_from(tmp_path):
    out = tmp_path / "kernels.json"
    made = run(norm(), out=out)
    assert json.loads(out.read_text()) == made
    assert (made["format"], made["kind"], made["source"]) == (ledger.FORMAT, "kernels", ledger.source_hash())
    assert made["provenance"]["versions"]["torch"] and made["triton"] and made["device"] == "cpu"
    assert made["ceilings"]["bytes_per_s"] > 1e6 and made["ceilings"]["flop_per_s"]["bf16"] > 1e6
    (entry,) = made["entries"]
    assert (entry["operation"], entry["size"], entry["tokens"], entry["images"]) == ("norm_modulate", "Ti", 4, 1)
    assert entry["floor_us"] == pytest.approx(1e6 * entry["bytes_moved"] / made["ceilings"]["bytes_per_s"])
    assert set(entry["rivals"]) == {OURS, "eager", "Inductor"}
    for timed in entry["rivals"].values():
        assert 0 < timed["us"]["low"] <= timed["us"]["median"] <= timed["us"]["high"]
        assert 0 < timed["error"] < 1e-5


def test_a_peer_that_raises_is_left_out_with_its_reason():
    def broken(inputs):
        raise NotImplementedError("heads of 72\nare not ours")

    (entry,) = run(with_rival(norm(), "theirs", broken))["entries"]
    assert entry["left_out"] == {"theirs": "NotImplementedError: heads of 72"}
    assert "theirs" not in entry["rivals"]


def test_ours_must_run():
    def broken(inputs):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        run(with_rival(norm(), OURS, broken))


def test_wrong_results_and_results_that_are_never_written_show_in_the_error():
    def wrong(inputs):
        return (torch.ones_like(inputs["x"]),)

    def infinite(inputs):
        return (torch.full_like(inputs["x"], torch.inf),)

    case = with_rival(with_rival(norm(), "wrong", wrong), "infinite", infinite)
    (entry,) = run(case)["entries"]
    assert entry["rivals"]["wrong"]["error"] > 0.1
    assert entry["rivals"]["infinite"]["error"] is None
    json.dumps(entry, allow_nan=False)


def test_a_run_that_was_cut_off_goes_on(tmp_path):
    out, seen = tmp_path / "kernels.json", []
    first = run(norm(4), out=out)
    whole = run(norm(4), norm(8), out=out, on_case=lambda entry: seen.append(entry.tokens))
    assert seen == [8]
    assert whole["entries"][0] == first["entries"][0] and len(whole["entries"]) == 2
    again = run(norm(4), norm(8), out=out, on_case=lambda entry: pytest.fail("measured again"))
    assert again["entries"] == whole["entries"] and again["ceilings"] == whole["ceilings"]


def test_what_other_kernels_measured_is_not_gone_on_with(tmp_path):
    out = tmp_path / "kernels.json"
    old = run(norm(4), out=out)
    out.write_text(json.dumps(old | {"source": "0" * 64}))
    assert [entry["tokens"] for entry in run(norm(8), out=out)["entries"]] == [8]
    out.write_text(json.dumps(old | {"device": "NVIDIA H200"}))
    assert [entry["tokens"] for entry in run(norm(8), out=out)["entries"]] == [8]
